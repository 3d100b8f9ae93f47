"""Tar shards of images: what is read of them, the order, broken ones, and distillation from them, resumed too."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from bcosification import distill
from bcosification.train.data import ImageDataModule, build_datamodule, check_source
from bcosification.train.lightning_module import DistillationModule
from bcosification.train.shards import ShardImages, _members, is_shards, shard_paths, split_shards
from tests.bcosification.train.test_distillation import config, equal, small


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def encoded(number):
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, numbers, extra=()):
    """As img2dataset writes one: an image, a caption and its metadata for every key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            files = {"png": encoded(number), "txt": b"a caption", "json": json.dumps({"key": number}).encode()}
            for kind, content in {**files, **dict(extra)}.items():
                info = tarfile.TarInfo(f"{number:09d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def shards(folder, count=5, each=6):
    for number in range(count):
        shard(folder / f"{number:05d}.tar", range(number * each, (number + 1) * each))
    return folder


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_every_image_and_nothing_else_is_read(tmp_path):
    shards(tmp_path / "a", 3)
    shard(tmp_path / "a" / "00003.tar", [99], {"seg.png": encoded(0), "cls": b"3"})
    data = ShardImages(shard_paths(tmp_path / "a"), to_tensor)
    assert len(data) == 19 and data.unreadable == []
    for index, number in enumerate([*range(18), 99]):
        image, label = data[index]
        assert label == 0 and torch.equal(image, to_tensor(Image.fromarray(pixels(number))))
    assert torch.equal(pickle.loads(pickle.dumps(data))[4][0], data[4][0]), "as workers get it"
    folders = tmp_path / "deep.tar"
    with tarfile.open(folders, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.folder/" + "long" * 40 + ".JPG")
        info.size = len(encoded(5))
        tar.addfile(info, io.BytesIO(encoded(5)))
    assert torch.equal(ShardImages([str(folders)], to_tensor)[0][0], to_tensor(Image.fromarray(pixels(5))))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("long_at", [None, 0, 3])
def test_members_are_those_of_tarfile(form, long_at, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("folder"))
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number in range(6):
            info = tarfile.TarInfo(f"deep/{'ü' if number == 1 else number}.png")
            if number == long_at:
                info.name = "/".join(["deep"] * 30) + "/long.png"
            info.size = 511 + number
            tar.addfile(info, io.BytesIO(bytes(range(256)) * 3))
    with tarfile.open(path) as tar:
        expected = [(member.offset_data, member.size) for member in tar if member.isreg()]
        names = [member.name.rpartition("/")[2] for member in tar.getmembers() if member.isreg()]
    found = list(_members(str(path)))
    assert [entry[1:] for entry in found] == expected and len(found) == 7
    assert [entry[0].rpartition("/")[2] for entry in found] == names


def test_patterns(tmp_path, monkeypatch):
    shards(tmp_path, 12, 1)
    names = [str(tmp_path / f"{number:05d}.tar") for number in range(12)]
    assert shard_paths(tmp_path) == shard_paths(tmp_path / "*.tar") == names
    assert shard_paths(f"{tmp_path}/{{00002..00010}}.tar") == names[2:11]
    assert shard_paths(f"{tmp_path}/{{00001,0000[67]}}.tar") == [names[1], names[6], names[7]]
    assert shard_paths(names[3]) == [names[3]]
    for wrong, error, message in (
        (f"{tmp_path}/{{00010..00012}}.tar", FileNotFoundError, "found none at .*00012.tar"),
        (f"{tmp_path}/x*.tar", FileNotFoundError, r"found none at .*x\*.tar"),
        (f"{tmp_path}/{{0000.tar", ValueError, "expected a pattern such as"),
        ("https://host/a.tar", ValueError, "shards on the file system .* got the address"),
        ("pipe:cat a.tar", ValueError, "shards on the file system"),
    ):
        with pytest.raises(error, match=message):
            shard_paths(wrong)


def test_what_is_taken_for_shards(tmp_path):
    assert is_shards("a/b.tar") and is_shards("{0..3}.tar") and not is_shards("digits") and not is_shards(tmp_path)
    shards(tmp_path / "flat", 2)
    (tmp_path / "flat" / "00000_stats.json").write_text("{}")
    assert is_shards(tmp_path / "flat")
    for name in ("train", "val"):
        shards(tmp_path / "split" / name, 1)
    assert is_shards(tmp_path / "split")
    (tmp_path / "split" / "train" / "n01440764").mkdir()  # unpacked: a folder of images with an archive in it
    assert not is_shards(tmp_path / "split")
    with pytest.raises(ValueError, match="one sub-folder per class, got shards .* distill takes them"):
        check_source(tmp_path / "flat")
    check_source(tmp_path / "flat", labelled=False)
    check_source(f"{tmp_path}/flat/{{00000..00001}}.tar", labelled=False)
    with pytest.raises(FileNotFoundError, match="expected shards"):
        check_source(tmp_path / "none.tar", labelled=False)
    with pytest.raises(FileNotFoundError, match=r"or a folder of images, or shards \(\*.tar\), got 'nowhere'"):
        check_source("nowhere", labelled=False)


def test_what_is_held_out(tmp_path):
    folder = shards(tmp_path / "many", 40, 1)
    (train, _), (val, _) = split_shards(folder, 0.05)
    assert len(val) == 2 and not set(train) & set(val) and sorted(train + val) == shard_paths(folder)
    assert split_shards(folder, 0.05)[1][0] == val
    one = shard(tmp_path / "one.tar", range(40))
    (paths, part), (_, other) = split_shards(one, 0.05)
    parts = [ShardImages(paths, to_tensor, part=name) for name in (part, other)]
    offsets = [set(data.places[:, 1].tolist()) for data in parts]
    assert (len(parts[0]), len(parts[1])) == (38, 2) and not offsets[0] & offsets[1]
    for name, numbers in (("train", range(7)), ("val", range(7, 10))):
        shard(tmp_path / "split" / name / "0.tar", numbers)
    data = build_datamodule(tmp_path / "split", image_size=16, labelled=False)
    assert (len(data.train), len(data.val)) == (7, 3)
    with pytest.raises(FileNotFoundError, match="at least two images in .*single.tar, found one"):
        ShardImages([str(shard(tmp_path / "single.tar", [1]))], to_tensor, part="train")


def test_an_epochs_order_goes_through_a_few_shards_at_a_time(tmp_path):
    data = ShardImages(shard_paths(shards(tmp_path, 10, 8)), to_tensor)
    order = data.order([3, 1])
    assert sorted(order.tolist()) == list(range(80)) and np.array_equal(order, data.order([3, 1]))
    assert not np.array_equal(order, data.order([3, 2])) and not np.array_equal(order, data.order([4, 1]))
    of_shard = data.places[order, 0]
    groups = [set(of_shard[start : start + 32].tolist()) for start in (0, 32, 64)]
    assert [len(group) for group in groups] == [4, 4, 2] and set.union(*groups) == set(range(10))
    assert len(set(of_shard[:8].tolist())) > 1, "mixed"


@pytest.mark.parametrize("replicas, count", [(1, 30), (2, 30), (4, 30), (4, 3)])
def test_processes_read_disjoint_images_in_stretches(replicas, count, tmp_path):
    folder = shards(tmp_path, 5, 6) if count == 30 else shards(tmp_path, 1, 3)
    images = ShardImages(shard_paths(folder), to_tensor)
    seen = []
    for rank in range(replicas):
        data = ImageDataModule(images, images, ["image"], batch_size=2, labelled=False)
        data.trainer = type("Trainer", (), {"world_size": replicas, "global_rank": rank})()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        seen.append(list(loader.sampler))
        assert len(seen[-1]) == len(loader.sampler)
    assert len({len(part) for part in seen}) == 1
    if count == 30:
        assert len(set().union(*seen)) == sum(map(len, seen)) >= 28
        assert sum(seen, []) == images.order([0, 2])[: sum(map(len, seen))].tolist()
    else:
        assert set().union(*map(set, seen)) == {0, 1, 2}


def test_the_loader_gives_the_same_whatever_the_workers(tmp_path):
    folder = shards(tmp_path)
    batches = []
    for workers in (0, 2):
        data = build_datamodule(folder, image_size=16, batch_size=4, num_workers=workers, seed=5, labelled=False)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        batches.append([images for images, _ in loader])
    assert len(batches[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_broken_shards_and_images(tmp_path):
    folder = shards(tmp_path / "a", 2)
    path = folder / "00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    data = ShardImages(shard_paths(folder), to_tensor)
    assert 6 < len(data) < 12 and [entry[0] for entry in data.unreadable] == [str(path)]
    for index in range(len(data)):
        assert torch.equal(data[index][0], to_tensor(Image.fromarray(pixels(index))))
    (folder / "00000.tar").write_bytes(b"no archive" * 100)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 2 can be read .first: .*00000.tar: ReadError"):
        ShardImages(shard_paths(folder), to_tensor)
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(FileNotFoundError, match="expected images .* in .*texts.tar"):
        ShardImages([str(tmp_path / "texts.tar")], to_tensor)
    shard(tmp_path / "b.tar", range(3), {"jpg": b"no image"})
    data = ShardImages([str(tmp_path / "b.tar")], to_tensor)
    with pytest.warns(UserWarning, match=r"image at byte \d+ of .*b.tar cannot be read and is left out"):
        assert [data[i] is None for i in range(6)] == [False, True] * 3


def test_a_distillation_from_shards_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    folder = shards(tmp_path / "shards", 3, 12)
    options = dict(data=f"{folder}/{{00000..00002}}.tar", num_workers=0, epochs=2, batch_size=4, limit_batches=2)
    whole = distill(config(tmp_path / "whole", **options), model=small())

    class Stop(Exception):
        pass

    step = DistillationModule.training_step

    def stopping(self, batch, batch_idx):
        if self.trainer.current_epoch == 1 and batch_idx == 1:
            raise Stop
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", stopping)
    with pytest.raises(Stop):
        distill(config(tmp_path / "parts", **options), model=small())
    monkeypatch.undo()
    torch.manual_seed(99)
    resumed = distill(config(tmp_path / "parts", **options), model=small(), resume=True)
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    assert [row["train_loss"] for row in whole.history] == [row["train_loss"] for row in resumed.history]
    assert whole.history[-1]["step"] == 4 and np.isfinite(whole.best)
