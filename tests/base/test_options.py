"""Options: read and checked by their types, named as who gave them knows them, and flat however they are nested."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import INTERNAL, Key, Texts, Word, from_dict, of_keys, options, to_dict, user_options
from pregate.base.sizes import SIZE, written


@options()
class Inner:
    model: str = ""
    number: Annotated[int, INTERNAL] = 0
    threads: Annotated[int, Field(ge=1), Key("inner_threads")] = 1
    tokens: Annotated[int | None, Field(ge=1)] = None


@options()
class Outer:
    model: str
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    between: Annotated[float, Field(gt=0, lt=1)] = 0.5
    width: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    most: Annotated[int | None, Field(ge=1), Word("all")] = 10
    kind: Literal["one", "other"] = "one"
    big: bool = False
    text: Texts = (Path("a"),)
    inner: Inner = field(default_factory=Inner)

    @classmethod
    def follow(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"share": 1.0} | given if given.get("big") else given


def test_what_users_can_say_is_one_flat_list():
    assert list(user_options(Outer)) == [
        *("model", "share", "between", "width", "most", "kind", "big", "text", "inner_threads", "tokens"),
    ]
    assert user_options(Outer)["inner_threads"].flag == "--inner-threads"


def test_text_is_read_by_the_fields_types():
    given = {"model": "m", "most": "all", "share": "0.25", "big": "true", "text": ["b", "c"]}
    read = of_keys(Outer, given | {"inner_threads": "3", "tokens": "none"})
    assert read == Outer("m", 0.25, most=None, big=True, text=(Path("b"), Path("c")), inner=Inner(threads=3))


@options()
class Sized:
    memory: Annotated[float | None, Field(gt=0), SIZE] = None
    store: Annotated[int, Field(ge=0), SIZE] = 0


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("16GB", 16 * 10**9),
        ("16GiB", 16 << 30),
        ("1.5 kB", 1500),
        ("500mb", 500 * 10**6),
        ("7B", 7),
        ("12", 12),
        ("16G", 16 * 10**9),
        ("2 ti", 2 << 40),
    ],
)
def test_bytes_are_read_as_sizes(text, num_bytes):
    assert of_keys(Sized, {"memory": text, "store": text}) == Sized(num_bytes, num_bytes)


def test_sizes_are_shown_as_they_are_written():
    shown = {9e11: "900GB", 1_239_999_999: "1.23GB", 16 << 30: "17.17GB", 1.15e12: "1.15TB", 4096: "4096", 1.5: "1.5"}
    assert {size: written(size) for size in shown} == shown


@pytest.mark.parametrize("text", ["16 gigs", "GB", "-1GB", "1,5GB", "16GBs"])
def test_what_is_no_size_is_told_how_one_is_written(text):
    with pytest.raises(UserError, match=r"store .*: allowed: a whole number, 0 or more, also as 16GB, 500MB or 16GiB"):
        of_keys(Sized, {"store": text})
    with pytest.raises(UserError, match=r"memory .*: allowed: a number, above 0, also as 16GB"):
        of_keys(Sized, {"memory": text})
    with pytest.raises(UserError, match="memory 0: allowed: above 0, also as 16GB"):
        of_keys(Sized, {"memory": "0GB"})


def test_it_crosses_processes():
    given = Outer("m", most=None, text=(Path("b"),), inner=Inner(tokens=5))
    assert from_dict(Outer, to_dict(given)) == given
    assert pickle.loads(pickle.dumps(given)) == given
    with pytest.raises(FrozenInstanceError):
        given.model = "n"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_default_follows_what_is_given_and_yields_to_it():
    assert Outer("m", big=True).share == 1.0
    assert Outer("m", 0.3, big=True).share == 0.3
    assert replace(Outer("m"), big=True).share == 0.5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"share": 0}, "--share 0: allowed: above 0, at most 1"),
        ({"share": float("nan")}, "--share nan: allowed: above 0, at most 1"),
        ({"between": 1}, "--between 1: allowed: between 0 and 1"),
        ({"width": "6"}, "--width 6: allowed: multiples of 4"),
        ({"most": "0"}, "--most 0: allowed: 1 or more, or all"),
        ({"most": True}, "--most True: allowed: 1 or more, or all"),
        ({"kind": "third"}, "--kind third: allowed: one, other"),
        ({"big": "perhaps"}, "--big perhaps: allowed: true or false"),
        ({"text": []}, "--text: 0 given; allowed: 1 or more files, folders or patterns of text"),
        ({"inner_threads": "two"}, "--inner-threads two: allowed: a whole number, 1 or more"),
        ({"colour": "red"}, "colour red: unknown option; allowed: model, share, between, width, most, kind, big"),
        ({"number": 1}, "number 1: unknown option"),
        (
            {"colour": 1, "widht": 2},
            "colour 1: unknown option; widht 2: unknown option; nearest: width; allowed: model",
        ),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(given, sentence):
    with pytest.raises(UserError) as error:
        of_keys(Outer, {"model": "m"} | given)
    assert error.value.for_command_line.startswith(sentence)


def test_a_missing_option_is_named():
    with pytest.raises(UserError, match=r"^model: missing"):
        of_keys(Outer, {})


@pytest.mark.parametrize(
    ("values", "named", "sentence"),
    [
        (("m", 0.5, 2), {}, r"^Two: 3 values without a name; allowed: 2, model, share$"),
        (("m",), {"model": "n"}, r"^model: given twice$"),
    ],
)
def test_values_without_a_name_are_as_many_as_there_are_fields(values, named, sentence):
    @options()
    class Two:
        model: str
        share: float = 0.5

    with pytest.raises(UserError, match=sentence):
        Two(*values, **named)


def test_python_and_the_command_line_call_an_option_by_their_own_names():
    error = UserError.of("--max-tokens", "a--b", "with --top-p 2 see `pregate generate --help`")
    assert error.for_command_line == "--max-tokens a--b: with --top-p 2 see `pregate generate --help`"
    assert str(error) == "max_tokens a--b: with top_p 2 see `pregate generate --help`"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
