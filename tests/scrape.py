"""Metrics as a scrape finds them, read by Prometheus' own client library."""

from __future__ import annotations

import dataclasses

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Scrape"]


@dataclasses.dataclass(frozen=True)
class Scrape:
    """`samples` by name and labels; `kinds` and `helps` by the name of the family."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    kinds: dict[str, str]
    helps: dict[str, str]

    @classmethod
    def of(cls, text: str) -> Scrape:
        samples, kinds, helps = {}, {}, {}
        for family in text_string_to_metric_families(text):
            # The library takes _total off a counter's name.
            suffix = "_total" if family.type == "counter" else ""
            name = family.name + suffix
            assert name not in kinds, name
            kinds[name], helps[name] = family.type, family.documentation
            for one in family.samples:
                key = (one.name, frozenset(one.labels.items()))
                assert key not in samples, f"twice: {key}"
                samples[key] = one.value
        return cls(samples, kinds, helps)

    def value(self, name: str, **labels: str) -> float | None:
        """The value of one sample; None if there is none."""
        return self.samples.get((name, frozenset(labels.items())))

    def labelled(self, name: str, label: str) -> dict[str, float]:
        """Values of all samples of a name by one label."""
        return {
            dict(labels)[label]: value
            for (one, labels), value in self.samples.items()
            if one == name
        }

    def labels(self) -> dict[str, set[str]]:
        """The label names of each sample's name."""
        found: dict[str, set[str]] = {}
        for name, labels in self.samples:
            found.setdefault(name, set()).update(dict(labels))
        return found
