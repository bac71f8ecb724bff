"""What a hostile or broken YAML file is answered with."""

from __future__ import annotations

import pytest

from megatron_gemini.config.yaml_file import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml


def test_an_alias_bomb_is_refused_before_it_can_grow():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(ValueError, match=r"run\.yaml, line 2: alias \*a0; write the value out instead"):
        parse_yaml(bomb, "run.yaml")


@pytest.mark.parametrize("count", [MAX_DEPTH + 1, 100_000])
def test_deep_nesting_is_refused_without_recursion(count):
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH} levels"):
        parse_yaml("[" * count + "]" * count, "run.yaml")


def test_a_large_file_is_refused_without_reading_it_all(tmp_path):
    path = tmp_path / "run.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that no machine could hold
    with pytest.raises(ValueError, match=f"larger than {MAX_BYTES} bytes"):
        read_yaml(path)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [exit 1]", "!!python/name:os.system", "a: !!python/tuple [1]"]
)
def test_a_tag_that_would_make_an_object_is_refused(text):
    with pytest.raises(ValueError, match=r"run\.yaml is no valid YAML: could not determine a constructor"):
        parse_yaml(text, "run.yaml")


def test_a_repeated_key_is_refused():
    with pytest.raises(ValueError, match=r"the key steps appears twice \(line 3, column 3\)"):
        parse_yaml("train:\n  steps: 1\n  steps: 2\n", "run.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", r"no valid YAML: .*\(line 1, column 6\)"),
        ("a: 1\n---\nb: 2\n", "no valid YAML: but found another document"),
        ("a: \x01", "no valid YAML"),
        ("- 1", "holds a list; a configuration is a mapping"),
        ("text", "holds a str; a configuration is a mapping"),
    ],
)
def test_what_is_no_mapping_in_yaml_is_told_in_one_line(text, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml ")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"cannot read the configuration {tmp_path}/absent\.yaml: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="Is a directory"):
        read_yaml(tmp_path)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"binary\.yaml is no UTF-8 text \(byte 3\)"):
        read_yaml(path)
