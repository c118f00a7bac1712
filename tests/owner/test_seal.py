"""Sealing: a genuine LUKS2 file with a dm-verity payload, the same from the same input."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tdxd.core import luks2, sealed
from tdxd.core.bundle import KeyBundle, volume_key
from tdxd.core.sealed import PublicRecord
from tdxd.errors import BadHeaderError, DataError, HostError, IntegrityError
from tdxd.owner.sealing import check, seal
from tests.owner.sealing import make, model_directory, quiet


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "model")


def run(*argv: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload, no-any-return]


def test_cryptsetup_knows_the_file_for_luks2(model: Path, tmp_path: Path) -> None:
    make(model, tmp_path / "out")
    image = str(tmp_path / "out" / "m.img")
    assert run("cryptsetup", "isLuks", "--type", "luks2", image).returncode == 0
    dump = run("cryptsetup", "luksDump", image)
    assert dump.returncode == 0, dump.stderr
    assert "cipher: aes-xts-plain64" in dump.stdout
    assert "offset: 16777216 [bytes]" in dump.stdout
    assert "sector: 4096 [bytes]" in dump.stdout
    assert "luks2\n" not in dump.stdout.split("Keyslots:")[1].split("Tokens:")[0]


def test_the_recovery_passphrase_opens_it_with_plain_cryptsetup(
    model, tmp_path
) -> None:
    recovery = tmp_path / "recovery"
    make(model, tmp_path / "out", recovery=recovery)
    assert stat.S_IMODE(recovery.stat().st_mode) == 0o600
    passphrase = recovery.read_text().rstrip("\n")
    assert len(passphrase.replace("-", "")) * 5 >= 128
    argv = ("cryptsetup", "open", "--test-passphrase", str(tmp_path / "out" / "m.img"))
    assert run(*argv, input=passphrase).returncode == 0
    assert run(*argv, input=passphrase + "x").returncode == 2


def test_without_recovery_no_passphrase_can_open_it(model, tmp_path) -> None:
    make(model, tmp_path / "out")
    argv = ("cryptsetup", "open", "--test-passphrase", str(tmp_path / "out" / "m.img"))
    assert run(*argv, input="anything").returncode != 0


def test_cryptsetup_accepts_our_volume_key(model, tmp_path) -> None:
    made = make(model, tmp_path / "out")
    key = tmp_path / "key"
    key.write_bytes(volume_key(made.bundle).reveal())
    argv = ["cryptsetup", "open", "--test-passphrase", "--key-size", "512"]
    image = str(tmp_path / "out" / "m.img")
    assert run(*argv, "--volume-key-file", str(key), image).returncode == 0
    key.write_bytes(bytes(64))
    assert run(*argv, "--volume-key-file", str(key), image).returncode != 0


def plaintext(made: seal.Sealed, image: Path, target: Path) -> None:
    manifest = made.bundle.manifest
    run_ = image.read_bytes()[manifest.payload_offset_bytes :]
    out = memoryview(bytearray(len(run_) + sealed.RUN_SLACK_BYTES))
    sealed.decrypt_run(volume_key(made.bundle).reveal(), 0, memoryview(run_), out)
    target.write_bytes(out[: len(run_)])


def test_veritysetup_verifies_the_payload(model, tmp_path) -> None:
    made = make(model, tmp_path / "out")
    manifest = made.bundle.manifest
    plain = tmp_path / "plain"
    plaintext(made, tmp_path / "out" / "m.img", plain)
    argv = ["veritysetup", "verify", str(plain), str(plain), manifest.root_hash.hex()]
    argv += ["--no-superblock", "--salt", manifest.salt.hex(), "--hash", "sha256"]
    argv += [f"--data-blocks={manifest.data_blocks}"]
    argv += [f"--hash-offset={manifest.data_blocks * 4096}"]
    done = run(*argv)
    assert done.returncode == 0, done.stderr


@pytest.mark.root
def test_the_kernel_mounts_it_with_normalised_modes(model, tmp_path) -> None:
    made = make(model, tmp_path / "out")
    plain, point = tmp_path / "plain", tmp_path / "point"
    plaintext(made, tmp_path / "out" / "m.img", plain)
    point.mkdir()
    mounted = run("mount", "-t", "erofs", "-o", "loop,ro", str(plain), str(point))
    assert mounted.returncode == 0, mounted.stderr
    try:
        for path in point.rglob("*"):
            private = "tls" in path.relative_to(point).parts[:1]
            wanted = (
                (0o700 if private else 0o555)
                if path.is_dir()
                else (0o600 if private else 0o444)
            )
            seen = path.lstat()
            assert stat.S_IMODE(seen.st_mode) == wanted, path
            assert (seen.st_uid, seen.st_gid) == (0, 0)
            source = model / path.relative_to(point)
            if path.is_file():
                assert path.read_bytes() == source.read_bytes()
        assert len(list(point.rglob("*"))) == len(list(model.rglob("*")))
    finally:
        run("umount", str(point))


def test_the_same_input_makes_the_same_files(model, tmp_path) -> None:
    make(model, tmp_path / "one", recovery=tmp_path / "r1")
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    for path in sorted(copy.rglob("*"), reverse=True):
        path.chmod(0o777)
        os.utime(path, (1, 1))
    make(copy, tmp_path / "two", recovery=tmp_path / "r2")
    for name in ("m.img", "m.img.json", "m.bundle"):
        assert (tmp_path / "one" / name).read_bytes() == (
            tmp_path / "two" / name
        ).read_bytes()
    assert (tmp_path / "r1").read_bytes() == (tmp_path / "r2").read_bytes()


@pytest.mark.root
def test_only_content_counts(model, tmp_path):
    """Whatever else a file system keeps of the same files makes no difference."""
    make(model, tmp_path / "one")
    copy = (
        Path("/dev/shm") / f"tdxd-seal-{os.getpid()}"
    )  # another file system, other order
    mask = os.umask(0o077)
    try:
        for path in sorted(model.rglob("*"), key=lambda one: one.name, reverse=True):
            other = copy / path.relative_to(model)
            if path.is_dir():
                other.mkdir(parents=True, exist_ok=True)
            else:
                other.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, other)
        os.link(copy / "models/m/1/whole", copy.with_suffix(".outside"))
        for number, path in enumerate(sorted(copy.rglob("*"))):
            os.chown(path, 100_000 + number, 7)
            os.utime(path, (number, 2**33 + number))
        make(copy, tmp_path / "two")
    finally:
        os.umask(mask)
        shutil.rmtree(copy)
        copy.with_suffix(".outside").unlink(missing_ok=True)
    one, two = (tmp_path / name / "m.img" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_holes_make_no_difference(model, tmp_path):
    size = 3 * 2**20 + 5
    sparse, dense = (model / "models/m/1" / name for name in ("weights", "weights.tmp"))
    with sparse.open("wb") as file:
        file.write(b"begin")
        file.seek(2**20)
        file.write(b"middle")
        file.truncate(size)
    assert sparse.stat().st_blocks * 512 < size
    make(model, tmp_path / "one")
    dense.write_bytes(sparse.read_bytes())
    assert dense.stat().st_blocks * 512 >= size
    dense.replace(sparse)
    make(model, tmp_path / "two")
    one, two = (tmp_path / name / "m.img" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    check.check_payload(one, make(model, tmp_path / "three").bundle, quiet)


def test_another_generation_shares_no_block(model, tmp_path) -> None:
    make(model, tmp_path / "one")
    make(model, tmp_path / "two", generation=4)
    one = (tmp_path / "one" / "m.img").read_bytes()[luks2.PAYLOAD_OFFSET_BYTES :]
    two = (tmp_path / "two" / "m.img").read_bytes()[luks2.PAYLOAD_OFFSET_BYTES :]
    for start in range(0, len(one), 4096):
        assert one[start : start + 4096] != two[start : start + 4096]


def test_what_is_written_and_with_which_rights(model, tmp_path) -> None:
    made = make(model, tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(one.name for one in out.iterdir()) == [
        "m.bundle",
        "m.img",
        "m.img.json",
    ]
    assert stat.S_IMODE((out / "m.bundle").stat().st_mode) == 0o600
    assert (
        KeyBundle.parse((out / "m.bundle").read_bytes()).manifest
        == made.bundle.manifest
    )
    record = PublicRecord.parse((out / "m.img.json").read_bytes(), source="r")
    assert record == made.record
    check.check_record(out / "m.img", record, quiet)
    check.check_payload(out / "m.img", made.bundle, quiet)


def test_no_plaintext_is_in_the_image(model, tmp_path) -> None:
    make(model, tmp_path / "out")
    data = (tmp_path / "out" / "m.img").read_bytes()
    assert b"secret" not in data
    assert b"saved_model.pb" not in data


@pytest.mark.parametrize("offset", [0, 4096, -4096, -1])
def test_a_flipped_payload_byte_is_found(model, tmp_path, offset: int) -> None:
    made = make(model, tmp_path / "out")
    image = tmp_path / "out" / "m.img"
    data = bytearray(image.read_bytes())
    place = offset if offset < 0 else luks2.PAYLOAD_OFFSET_BYTES + offset
    data[place] ^= 1
    image.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"is not what was sealed|does not open"):
        check.check_payload(image, made.bundle, quiet)
    with pytest.raises(IntegrityError, match="the record says"):
        check.check_record(image, made.record, quiet)


def test_a_truncated_image_is_found(model, tmp_path) -> None:
    made = make(model, tmp_path / "out")
    image = tmp_path / "out" / "m.img"
    os.truncate(image, made.record.size_bytes - 1)
    with pytest.raises(IntegrityError, match="needs"):
        check.check_payload(image, made.bundle, quiet)
    with pytest.raises(IntegrityError, match="bytes, the record says"):
        check.check_record(image, made.record, quiet)


def test_existing_files_are_kept_without_force(model, tmp_path) -> None:
    make(model, tmp_path / "out")
    with pytest.raises(DataError, match="exists already"):
        make(model, tmp_path / "out")
    make(model, tmp_path / "out", force=True)
    assert len(list((tmp_path / "out").iterdir())) == 3


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (os.mkfifo, "is a FIFO"),
        (bind_socket, "is a socket or device"),
        (lambda path: path.symlink_to("/etc/passwd"), "link, to /etc/passwd"),
        (lambda path: path.symlink_to("../../../x"), r"link, to \.\./\.\./\.\./x"),
        (lambda path: path.symlink_to("1"), "link, to 1"),
    ],
    ids=["fifo", "socket", "absolute-link", "escaping-link", "inner-link"],
)
def test_only_files_and_directories_are_sealed(model, tmp_path, action, text) -> None:
    path = model / "models" / "m" / "odd"
    action(path)
    with pytest.raises(
        DataError, match=f"{path} is .*{text}" if "link" in text else text
    ):
        make(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_private_file_linked_from_the_models_is_refused(model, tmp_path) -> None:
    os.link(model / "tls" / "server.pem", model / "models" / "m" / "1" / "leak")
    with pytest.raises(DataError, match="hard link joins a file below tls/"):
        make(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_hard_link_among_the_models_is_kept(model, tmp_path) -> None:
    version = model / "models" / "m" / "1"
    os.link(version / "saved_model.pb", version / "again.pb")
    make(model, tmp_path / "out")


def test_a_name_that_cannot_be_given_takes_back_the_others(model, tmp_path) -> None:
    out = tmp_path / "out"
    (out / "m.img").mkdir(
        parents=True
    )  # the image is named last, and cannot replace it
    with pytest.raises(HostError, match=r"create .*m\.img"):
        make(model, out, force=True)
    assert [one.name for one in out.iterdir()] == ["m.img"]


def test_a_directory_whose_name_looks_like_an_option(
    model, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.rename(tmp_path / "-zlz4")
    make(Path("-zlz4"), tmp_path / "out")


@pytest.mark.root
def test_a_full_disk_is_noticed_before_anything_is_done(model, tmp_path) -> None:
    point = tmp_path / "small"
    point.mkdir()
    assert (
        run("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(point)).returncode == 0
    )
    try:
        with pytest.raises(DataError, match="has 1 MiB free, sealing needs"):
            make(model, point)
        assert list(point.iterdir()) == []
    finally:
        run("umount", str(point))


def test_a_directory_without_models_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no models"):
        make(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("kind", [os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_force_replaces_no_device_and_no_fifo(model, tmp_path, kind) -> None:
    (tmp_path / "out").mkdir()
    kind(tmp_path / "out" / "m.img")
    with pytest.raises(DataError, match="is neither a file nor a block device"):
        make(model, tmp_path / "out", force=True)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["m.img"]


def test_a_fifo_is_no_image_and_does_not_hang(model, tmp_path) -> None:
    made = make(model, tmp_path / "out")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadHeaderError, match="neither a file nor a block device"):
        check.check_record(tmp_path / "fifo", made.record, quiet)


def test_a_missing_output_directory_is_named(model, tmp_path) -> None:
    with pytest.raises(HostError, match="nowhere"):
        make(model, tmp_path / "out", image=tmp_path / "nowhere" / "m.img")


@pytest.mark.root
def test_any_user_can_seal_and_gets_the_same_file(model, tmp_path) -> None:
    make(model, tmp_path / "out", generation=1, recovery=tmp_path / "recovery")
    root = Path(__file__).parents[2]
    out = Path("/var/tmp") / f"tdxd-seal-{os.getpid()}"
    try:
        for path in sorted(model.rglob("*"), reverse=True):  # another creation order
            if path.is_file():
                copy = out / "model" / path.relative_to(model)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        shutil.copyfile(tmp_path / "out" / "m.bundle", out / "old.bundle")
        assert run("chown", "-R", "65534:65534", str(out)).returncode == 0
        argv = [sys.executable, "-m", "tdxd.cli.tdx_seal", "create", str(out / "model")]
        argv += ["--id", "m", "--generation", "1", "-o", str(out / "m.img")]
        argv += ["--bundle", str(out / "m.bundle"), "--recovery", str(out / "recovery")]
        argv += ["--secret-from", str(out / "old.bundle")]
        nobody = {"user": 65534, "group": 65534, "extra_groups": []}
        done = run(*argv, cwd=root, **nobody)
        assert (done.returncode, done.stderr) == (0, "")
        assert (out / "m.img").stat().st_uid == 65534
        assert (out / "m.img").read_bytes() == (tmp_path / "out/m.img").read_bytes()
        tested = run(
            *("cryptsetup", "open", "--test-passphrase", str(out / "m.img")),
            input=(out / "recovery").read_text().rstrip("\n"),
            **nobody,
        )
        assert tested.returncode == 0, tested.stderr
    finally:
        shutil.rmtree(out)
