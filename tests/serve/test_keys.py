"""Keys: who is let in by which, what the file may look like, and how a running server learns of a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from medcompile.errors import UsageError
from medcompile.serve.keys import ADMIN, ANONYMOUS, INFERENCE, METRICS, Key, Keyring, digest, edited, new_key, read
from medcompile.serve.rates import Rate
from tests.command_line import call


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def made(path: Path, *names: str, roles: tuple[str, ...] = (INFERENCE,), expires: int | None = None) -> list[str]:
    fresh = [new_key() for _ in names]
    with edited(path) as keys:
        keys += [Key(n, roles, digest(k), 1_700_000_000, expires) for n, k in zip(names, fresh, strict=True)]
    return fresh


def test_each_key_lets_in_its_own_caller_and_any_other_text_nobody(tmp_path: Path) -> None:
    one, two = made(tmp_path / "keys", "ward-3", "ward-4")
    ring = Keyring(tmp_path / "keys")
    first, second = ring.caller(one), ring.caller(two)
    assert first is not None and first.name == "ward-3" and first.may(INFERENCE) and not first.may(METRICS)
    assert second is not None and second.name == "ward-4"
    for wrong in ("", one[:-1], one + "x", one.upper(), digest(one), "mc_", "\udcff", "é" * 50, "x" * 100_000):
        assert ring.caller(wrong) is None


def test_the_file_holds_no_key_and_is_its_owners_alone(tmp_path: Path) -> None:
    (one,) = made(tmp_path / "keys", "ward-3")
    text = (tmp_path / "keys").read_text()
    assert one not in text and one[3:] not in text and digest(one) in text
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600


def test_a_key_is_256_bits_and_none_comes_twice() -> None:
    assert len({new_key() for _ in range(1000)}) == 1000
    assert all(len(new_key()) == 46 and new_key().startswith("mc_") for _ in range(10))


def test_a_key_ends_when_its_time_is_over(tmp_path: Path) -> None:
    clock = Clock()
    (one,) = made(tmp_path / "keys", "guest", expires=int(clock.now_s) + 60)
    ring = Keyring(tmp_path / "keys", clock)
    assert ring.caller(one) is not None
    clock.now_s += 60
    assert ring.caller(one) is None


def test_an_admin_may_all_and_a_nameless_caller_of_a_local_server_may_not() -> None:
    assert all(Key("a", (ADMIN,), "0" * 64, 0).caller.may(role) for role in (ADMIN, INFERENCE, METRICS))
    assert ANONYMOUS.may(INFERENCE) and not ANONYMOUS.may(ADMIN)


def test_keys_added_and_removed_hold_a_second_later_without_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    (one,) = made(tmp_path / "keys", "ward-3")
    ring = Keyring(tmp_path / "keys", clock)
    (two,) = made(tmp_path / "keys", "ward-4")
    assert ring.caller(two) is None  # not looked at again within the second
    clock.now_s += 1
    assert ring.caller(two) is not None
    with edited(tmp_path / "keys") as keys:
        keys[:] = [key for key in keys if key.name != "ward-3"]
    clock.now_s += 1
    assert ring.caller(one) is None and ring.caller(two) is not None


def test_a_slip_in_the_file_leaves_the_keys_as_they_were_and_is_told(tmp_path: Path) -> None:
    (one,) = made(tmp_path / "keys", "ward-3")
    ring = Keyring(tmp_path / "keys")
    (tmp_path / "keys").write_text("{not json\n")
    ring.reload()
    assert ring.caller(one) is not None
    assert ring.problem.endswith("keys:1: is not a key: {name, roles, sha256, created}")
    made_again = tmp_path / "again"
    (two,) = made(made_again, "ward-4")
    made_again.replace(tmp_path / "keys")
    ring.reload()
    assert ring.problem == "" and ring.caller(one) is None and ring.caller(two) is not None


def test_a_file_that_is_gone_or_empty_leaves_no_key_valid(tmp_path: Path) -> None:
    (one,) = made(tmp_path / "keys", "ward-3")
    ring = Keyring(tmp_path / "keys")
    (tmp_path / "keys").write_text("")
    ring.reload()
    assert ring.caller(one) is None
    ring = Keyring(tmp_path / "keys")
    (tmp_path / "keys").unlink()
    ring.reload()
    assert ring.caller(one) is None and "gone" in ring.problem


GOOD = '{"name":"a","roles":["inference"],"sha256":"' + "0" * 64 + '","created":"2026-01-01T00:00:00Z"}'


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[]", "is not a key"),
        ("7", "is not a key"),
        (GOOD.replace("inference", "boss"), "roles are not known"),
        (GOOD.replace('["inference"]', "[]"), "roles are not known"),
        (GOOD.replace('["inference"]', '"admin"'), "is not a key"),
        (GOOD.replace('"a"', '"a b"'), "a key's name is"),
        (GOOD.replace('"a"', '"a\\n"'), "a key's name is"),
        (GOOD.replace("0" * 64, "0" * 63), "sha256 is not 64 hex digits"),
        (GOOD.replace("2026-01-01T00:00:00Z", "yesterday"), "is not a key"),
        (GOOD[:-1] + ',"expires":"soon"}', "is not a key"),
        (GOOD[:-1] + ',"requests_per_minute":0}', "a rate is a number"),
        (GOOD[:-1] + ',"requests_per_minute":1e999}', "a rate is a number"),
        (GOOD[:-1] + ',"requests_per_minute":5,"burst":0}', "at least 1"),
        (GOOD[:-1] + ',"role":"admin"}', "is not a key"),
        (GOOD + "\n" + GOOD, "more than once"),
    ],
)
def test_a_line_that_is_no_key_is_told_with_its_place(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "keys").write_text(line + "\n")
    with pytest.raises(UsageError, match="keys") as raised:
        read(tmp_path / "keys")
    assert told in raised.value.message and raised.value.fix


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "keys", "ward-3")
    (tmp_path / "keys").chmod(0o620)
    with pytest.raises(UsageError, match="may be written by others"):
        Keyring(tmp_path / "keys")


def test_an_edit_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    made(tmp_path / "keys", "ward-3")
    before = (tmp_path / "keys").read_bytes()
    with pytest.raises(RuntimeError), edited(tmp_path / "keys") as keys:
        keys.clear()
        raise RuntimeError
    assert (tmp_path / "keys").read_bytes() == before


# ---- the command


def test_keys_add_prints_the_key_once_and_it_opens_the_door(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    done = call(
        "keys",
        "add",
        "ward-3",
        "-f",
        file,
        "--role",
        "inference",
        "--role",
        "metrics",
        "--rate",
        600,
        "--expires",
        "90d",
    )
    assert done.exit_code == 0
    caller = Keyring(file).caller(done.stdout.strip())
    assert caller is not None and caller.rate == Rate(600, 60) and caller.may(METRICS) and not caller.may(ADMIN)
    assert done.stdout.strip() not in done.stderr and "shown this once" in done.stderr


def test_keys_list_shows_names_and_ends_and_no_whole_digest(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    (one,) = made(file, "ward-3", expires=1_700_000_060)
    plain, machine = call("keys", "list", "-f", file).stdout, call("keys", "list", "-f", file, "--json").stdout
    assert "ward-3" in plain and "(over)" in plain and '"2023-11-14T22:14:20Z"' in machine
    assert digest(one) not in plain + machine and digest(one)[:8] in plain


def test_keys_remove_ends_a_key_and_an_unknown_name_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    made(file, "ward-3", "ward-4")
    assert call("keys", "remove", "ward-3", "-f", file).exit_code == 0
    assert [key.name for key in read(file)] == ["ward-4"]
    wrong = call("keys", "remove", "ward-3", "-f", file)
    assert wrong.exit_code == 2 and "no key named ward-3" in wrong.stderr


def test_keys_rotate_keeps_the_old_key_for_as_long_as_told(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    old = call("keys", "add", "ward-3", "-f", file, "--rate", 60).stdout.strip()
    new = call("keys", "rotate", "ward-3", "-f", file, "--keep", "1h").stdout.strip()
    ring = Keyring(file)
    both = ring.caller(old), ring.caller(new)
    assert all(caller is not None and caller.name == "ward-3" and caller.rate == Rate(60, 6) for caller in both)
    last = call("keys", "rotate", "ward-3", "-f", file).stdout.strip()
    ring = Keyring(file)
    assert ring.caller(old) is None and ring.caller(new) is None and ring.caller(last) is not None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["add", "ward 3"], "a key's name is"),
        (["add", "a", "--role", "boss"], "roles are not known"),
        (["add", "a", "--rate", "-1"], "a rate is a number"),
        (["add", "a", "--burst", "3"], "--burst without --rate"),
        (["add", "a", "--expires", "soon"], "not a span of time"),
        (["list"], "No such file"),
    ],
)
def test_a_wrong_use_of_keys_says_how_to_use_it(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = call("keys", *arguments, "-f", tmp_path / "keys")
    assert done.exit_code == 2 and told in done.stderr and "fix:" in done.stderr
    assert not (tmp_path / "keys").exists()
