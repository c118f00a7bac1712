"""Judges the configuration, the machine, its programs and the image files."""

from __future__ import annotations

from collections.abc import Iterator

from tdxd.guest.finding import Facts, Finding, ImageFact, fail, ok, warn

__all__ = ["judge_config", "judge_images", "judge_machine", "judge_programs"]


def judge_config(facts: Facts) -> Iterator[Finding]:
    """Yield whether the configuration is one that has something to do."""
    count = len(facts.config.volume)
    if not count:
        yield warn(
            "config", "the configuration names no volume", "add a [[volume]] to it"
        )
    else:
        yield ok("config", f"the configuration is right and names {count} volumes")


def judge_machine(facts: Facts) -> Iterator[Finding]:
    """Yield what the machine lacks."""
    machine = facts.machine
    if machine.uid != 0:
        text = f"asked as uid {machine.uid}: only root sees all of this"
        yield warn("root", text, "sudo tdxd doctor")
    yield _mapper(facts)
    yield _unit(facts)


def _mapper(facts: Facts) -> Finding:
    machine = facts.machine
    if "erofs" not in machine.file_systems:
        text = "this kernel has no erofs, the file system of all volumes"
        return fail("mapper", text, "modprobe erofs, or a kernel with CONFIG_EROFS_FS")
    if not machine.loop:
        text = "there is no /dev/loop-control, and images are files"
        return fail(
            "mapper", text, "modprobe loop, or a kernel with CONFIG_BLK_DEV_LOOP"
        )
    wanted = facts.config.mapping.mapper
    todo = "modprobe dm_mod dm_crypt dm_verity, as root"
    if not machine.device_mapper and wanted == "dm":
        text = "mapping.mapper is dm, and no device mapper answers"
        return fail("mapper", text, todo)
    if not machine.device_mapper and wanted == "auto":
        text = "no device mapper answers: images are decrypted whole, into memory"
        return warn("mapper", text, todo)
    return ok("mapper", f"images are opened by {_mapper_name(facts)}")


def _mapper_name(facts: Facts) -> str:
    wanted = facts.config.mapping.mapper
    return "dm" if facts.machine.device_mapper and wanted != "memory" else "memory"


def _unit(facts: Facts) -> Finding:
    if facts.machine.unit == "enabled":
        return ok("unit", "tdxd.service starts with the machine")
    if facts.machine.unit == "disabled":
        text = "tdxd.service does not start with the machine"
        return warn("unit", text, "systemctl enable --now tdxd")
    if facts.machine.unit == "absent":
        text = "there is no tdxd.service"
        return warn("unit", text, "install the package tdxd")
    text = "systemd does not run this machine: nobody starts tdxd again"
    return warn("unit", text, "start tdxd by what runs here, and again when it ends")


def judge_programs(facts: Facts) -> Iterator[Finding]:
    """Yield whether the programs are here that tdxd starts, and their users."""
    config = facts.config
    if config.control.group is not None and not facts.machine.group:
        yield warn(
            "group",
            f"there is no group {config.control.group}: only root may look at the daemon",
            f"groupadd --system {config.control.group}",
        )
    if config.serving is None:
        return
    if not facts.machine.user:
        yield fail(
            "user",
            f"there is no user {config.serving.user} to run the model server",
            f"useradd --system {config.serving.user}",
        )
    if facts.haproxy is None:
        text = f"there is no program {config.serving.haproxy}, the front of all models"
        yield fail("front", text, "apt install haproxy")
    else:
        yield ok("front", f"the front is {facts.haproxy}")
    problem = facts.model_server_problem
    if problem is not None:
        yield fail("model-server", problem.message, problem.hint)
    else:
        yield ok("model-server", f"the model server is {facts.model_server}")


def judge_images(facts: Facts) -> Iterator[Finding]:
    """Yield which volumes have an image, and whether memory is enough for all."""
    sizes = []
    for image in facts.images:
        yield _image(facts, image)
        sizes.append(max(image.sizes_bytes, default=0))
    total, memory = sum(sizes), facts.machine.memory_bytes
    if total > memory:
        yield warn(
            "memory",
            f"the images have {_mib(total)} together, this machine {_mib(memory)} of memory",
            "give the guest more memory: a model server holds its models there",
        )
    elif sizes:
        yield ok("memory", f"{_mib(memory)} of memory for {_mib(total)} of images")


def _image(facts: Facts, image: ImageFact) -> Finding:
    name = f"image {image.volume_id}"
    if not image.sizes_bytes:
        todo = "copy the sealed image there; tdxd opens it by itself when it appears"
        return warn(name, f"no file matches {image.pattern}", todo)
    size, limit = max(image.sizes_bytes), facts.config.mapping.memory_limit_bytes
    needed = min(limit, facts.machine.memory_bytes)
    if _mapper_name(facts) == "memory" and size > needed:
        text = (
            f"{image.pattern} has {_mib(size)}, the memory mapper takes {_mib(needed)}"
        )
        todo = "use the device mapper, or more memory and mapping.memory_limit_bytes"
        return fail(name, text, todo)
    return ok(name, f"{image.pattern} is there, {_mib(size)}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
