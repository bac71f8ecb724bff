"""A hostile corpus through the loader: skipped by the right reason, in bounded memory, with nothing of it run."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.yaml_file import read_yaml
from megatron_gemini.data.loading.loader import Loader
from tests.adversarial import write_corpus
from tests.tiny_shards import FORM, LAYOUT, Characters, run_config, texts, write_tar

ROOT = Path(__file__).parents[3]
ADDRESS_SPACE = 8 << 30  # a reader that believes what a file says of itself fails instead of taking the machine
MEMORY = 200  # MB beyond what the process has after its imports


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adversarial")
    return write_corpus(folder, folder / "canary"), folder / "canary"


@pytest.fixture(scope="module")
def result(corpus):
    arguments = [word for source in corpus[0] for word in (source.task, source.shard)]
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({ADDRESS_SPACE}, {ADDRESS_SPACE})); "
        f"from tests.unit.data import adversarial_run; adversarial_run.main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_bad_sample_is_skipped_for_its_own_reason_and_no_good_one_is(corpus, result):
    for source, found in zip(corpus[0], result["sources"], strict=True):
        keys = [key.rpartition("-")[0] for key in found["keys"]]
        expected = Counter(reason for reason in keys if reason not in ("good", ""))
        assert found["skipped"] == {**expected, **source.rejected}, source.task


def test_all_of_the_corpus_was_met(corpus, result):
    met = {source.shard: set(found["keys"]) for source, found in zip(corpus[0], result["sources"], strict=True)}
    assert sorted(len(keys) for keys in met.values()) == [7, 8, 10, 21, 23, 23, 23, 30]


def test_memory_stays_bounded(result):
    assert 1 < result["grown_mb"] < MEMORY


def test_no_code_of_the_corpus_runs(corpus, result):
    assert result["sources"]
    assert not corpus[1].exists()


@pytest.mark.parametrize("address", ["pipe:touch {}", "|touch {}", "$(touch {}).tar", "file://x; touch {}"])
def test_a_shard_s_address_is_never_a_command(address, tmp_path):
    canary = tmp_path / "canary"
    with pytest.raises(ValueError, match="shard"):
        config = run_config([SourceConfig(shards=address.format(canary), task="text", name="s")])
        Loader(config, 0, 1, LAYOUT, Characters(), FORM)
    assert not canary.exists()


def test_a_share_of_bad_samples_stops_the_run_with_the_table_of_reasons(tmp_path):
    good = ((f"good{i:03d}", {"txt": b"text"}) for i in range(300))
    bad = [(f"bad{i:03d}", {"txt": b"\xff" if i % 3 else b" "}) for i in range(60)]
    shard = write_tar(tmp_path / "t.tar", [*good, *bad])
    config = run_config([SourceConfig(shards=shard, task="text", name="words")], max_bad_share=0.1)
    with Loader(config, 0, 1, LAYOUT, Characters(), FORM) as loader, pytest.raises(ValueError) as stopped:
        for _ in range(500):
            loader.next()
    assert "more than data.max_bad_share (0.1)" in str(stopped.value)
    lines = dict(line.split()[1:] for line in str(stopped.value).splitlines()[1:])
    assert set(lines) == {"bad_text", "empty_text"}
    assert int(lines["bad_text"]) > int(lines["empty_text"]) > 0


def test_a_bad_shard_is_told_by_its_name(tmp_path, caplog):
    texts(tmp_path / "t-0.tar", 10)
    broken = Path(texts(tmp_path / "t-1.tar", 10))
    broken.write_bytes(broken.read_bytes()[:-12_000])
    config = run_config([SourceConfig(shards=str(tmp_path / "t-*.tar"), task="text", name="t")])
    with Loader(config, 0, 1, LAYOUT, Characters(), FORM) as loader:
        assert loader.skipped == {("t", "tar_damaged"): 1}
    assert "t-1.tar' is damaged (it breaks off" in caplog.text
    for content in (b"", b"no tar at all" * 100, b"\x1f\x8b\x08" + bytes(2000)):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"the shard '.*t-1\.tar' holds no usable sample"):
            Loader(config, 0, 1, LAYOUT, Characters(), FORM)


def test_a_configuration_is_no_bomb_either(tmp_path):
    path = tmp_path / "run.yaml"
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    for text, message in (
        (bomb, "alias"),
        ("data: " + "[" * 10_000 + "]" * 10_000, "nested deeper"),
        ("data: {lanes: 1}\ndata: {lanes: 2}\n", "appears twice"),
        ("data: !!python/object/apply:os.system ['touch canary']\n", "no valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yaml(path)
