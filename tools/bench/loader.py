"""The loader against others, and what it takes as data grows.

    python tools/bench/loader.py --folder /tmp/bench decode      # needs: pip install webdataset megatron-energon
    python tools/bench/loader.py --folder /tmp/bench startup
    python tools/bench/loader.py --folder /tmp/bench memory

decode: samples per CPU-second from the same shards of 512 x 512 JPEGs to uint8[224, 224, 3], one process, one reader
after the other in every round. Those of webdataset and megatron-energon that are not installed are left out.
startup: opening a source of 10,000 shards with index files (links to one tar of 1,000 samples).
memory: resident memory of the process while the loader goes through 100,000 samples.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Given
from megatron_gemini.config.training import TrainConfig
from megatron_gemini.contracts import RowFormat, TokenLayout
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.sources.index_cache import index_path, write_index
from megatron_gemini.data.sources.shard_writer import write_shards
from megatron_gemini.data.sources.shards import Shards, expand_shards
from megatron_gemini.modalities.image.preprocess import decode_image, fit_image

SIDE, TARGET, PATCH = 512, 224, 14
LAYOUT = TokenLayout(256, (("image", 0),))


class Bytes:
    """A text tokenizer whose ids are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def picture(seed: int) -> bytes:
    """A JPEG whose spectrum falls off like a photograph's; about 70 kB."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    frequency[0, 0] = 1.0
    noise = np.fft.fft2(random.standard_normal((3, SIDE, SIDE)), axes=(1, 2)) / frequency**1.4
    planes = np.fft.ifft2(noise, axes=(1, 2)).real
    planes = 128 + 45 * planes / planes.std((1, 2), keepdims=True)
    file = io.BytesIO()
    Image.fromarray(np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()


def pictures(folder: Path, count: int) -> list[str]:
    """Shards of `count` pictures with their indices, made once."""
    if not folder.exists():
        samples = ((f"{i:05d}", {"jpg": picture(i), "txt": b"a photo"}) for i in range(count))
        for shard in write_shards(folder, "photo", samples, 100):
            write_index(str(shard))
    return sorted(map(str, folder.glob("photo-*.tar")))


def ours(paths: list[str]) -> Iterator[np.ndarray]:
    shards = Shards(paths)
    for sample in range(len(shards)):
        (data,) = shards.read(sample, ["jpg"]).values()
        yield fit_image(decode_image(data, shrink_to=TARGET), PATCH, TARGET)


def resized(image: Image.Image) -> np.ndarray:
    """What ours gives, as the others' users write it."""
    return np.asarray(image.convert("RGB").resize((TARGET, TARGET), Image.Resampling.BICUBIC))


def by_webdataset(paths: list[str]) -> Iterator[np.ndarray]:
    import webdataset

    for sample in webdataset.WebDataset(paths, shardshuffle=False).decode("pil"):
        yield resized(sample["jpg"])


def by_energon(paths: list[str]) -> Iterator[np.ndarray]:
    from megatron.energon import DefaultTaskEncoder, SampleDecoder, WorkerConfig, get_loader, get_val_dataset
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder = Path(paths[0]).parent
    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        names = [Path(path).name for path in paths]
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("val", 1.0)], workers=1)
        (folder / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CaptioningWebdataset\nfield_map: {image: jpg, caption: txt}\n"
        )

    class Encoder(DefaultTaskEncoder):
        decoder = SampleDecoder(image_decode="pilrgb")

        def encode_sample(self, sample):  # type: ignore[no-untyped-def]
            sample.image = resized(sample.image)
            return sample

        def batch(self, samples):  # type: ignore[no-untyped-def]
            return samples

    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(folder, worker_config=alone, batch_size=1, task_encoder=Encoder())
    for batch in get_loader(dataset):
        yield from (sample.image for sample in batch)


READERS: dict[str, Callable[[list[str]], Iterator[np.ndarray]]] = {
    "megatron_gemini": ours,
    "webdataset": by_webdataset,
    "megatron.energon": by_energon,
}


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def decode(folder: Path, rounds: int) -> dict[str, Given]:
    paths = pictures(folder / "photos", 400)
    readers = {name: reader for name, reader in READERS.items() if installed(name)}
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):  # the first one warms up
        for name, reader in readers.items():
            began, count = time.process_time(), 0
            for image in reader(paths):
                assert image.shape == (TARGET, TARGET, 3), image.shape
                count += 1
            assert count == 400, (name, count)
            if number:
                rates[name].append(count / (time.process_time() - began))
    result: dict[str, Given] = {name: {"median": statistics.median(r), "best": max(r)} for name, r in rates.items()}
    others = [name for name in rates if name != "megatron_gemini"]
    for name in others:
        ratios = [mine / other for mine, other in zip(rates["megatron_gemini"], rates[name], strict=True)]
        result[f"ratio to {name}"] = {"median": statistics.median(ratios), "least": min(ratios)}
    return result


def startup(folder: Path) -> dict[str, Given]:
    many = folder / "many"
    write_shards(folder, "one", ((f"{i:05d}", {"txt": b"a text", "json": b"{}"}) for i in range(1000)))
    one = str(folder / "one-000.tar")
    write_index(one)
    many.mkdir(exist_ok=True)
    for number in range(10_000):
        path = str(many / f"s-{number:05d}.tar")
        if not os.path.exists(path):
            os.link(one, path)
            os.link(index_path(one), index_path(path))
    began, cpu = time.perf_counter(), time.process_time()
    source = SourceConfig(shards=f"{many}/s-{{00000..09999}}.tar", task="text", name="many")
    with Loader(config(folder, source), 0, 1, LAYOUT, Bytes(), RowFormat()) as loader:
        loader.next()
        samples = len(loader.sources[0])
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return {"shards": len(expand_shards(source.shards)), "samples": samples, **seconds, "resident_MB": resident() >> 20}


def memory(folder: Path) -> dict[str, Given]:
    tiny = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(tiny, "PNG")
    folder /= "tiny"
    samples = ((f"{i:06d}", {"png": tiny.getvalue(), "txt": b"a red square"}) for i in range(100_000))
    if not folder.exists():
        for shard in write_shards(folder, "t", samples, 10_000):
            write_index(str(shard))
    source = SourceConfig(shards=f"{folder}/t-*.tar", task="caption", name="tiny")
    found: dict[str, Given] = {}
    seen, due = 0, 10_000
    with Loader(config(folder, source), 0, 1, LAYOUT, Bytes(), RowFormat()) as loader:
        while seen < 100_000:
            seen += sum(len(batch.samples) for batch in loader.next().values())
            if seen >= due:
                found[str(seen)] = resident() >> 20
                due += 15_000
    return {"resident_MB_after_samples": found}


def config(folder: Path, source: SourceConfig) -> RunConfig:
    data = DataConfig(sources=(source,), row_tokens=1024, lanes=8, cache_bytes=0, prefetch=0)
    train = TrainConfig(rows_per_step=8, output_dir=str(folder / "run"))
    encoders = {"vision": VisionConfig(patch=PATCH, max_side=TARGET), "audio": AudioConfig(enabled=False)}
    return RunConfig(data=data, train=train, encoders=encoders)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the generated shards")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("part", choices=("decode", "startup", "memory"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], dict[str, Given]]] = {
        "decode": lambda: decode(options.folder, options.rounds),
        "startup": lambda: startup(options.folder),
        "memory": lambda: memory(options.folder),
    }
    print(json.dumps(parts[options.part]()))


if __name__ == "__main__":
    main()
