"""dfl: every data set's layout on a miniature, styles, and what damaged data say."""

import gzip
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from layouts import dfl_folder, dfl_office, dfl_pacs
from PIL import Image

from dfl.analysis import background_share, probe_samples, probe_score, sensitivity
from dfl.data import STYLES, load_data, mnist, skewed, sklearn_digits
from dfl.domains import DIGITS, DOMAINNET, OFFICE, PACS, augment
from dfl.train import PRESETS, Config
from shared.runtime import UserError


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_mnist_files_packed_or_not_and_the_test_file_alone(tmp_path):
    rng = np.random.default_rng(0)
    test, train = rng.integers(0, 256, (5, 28, 28)), rng.integers(0, 256, (7, 28, 28))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", test)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(5))
    images, labels = mnist(tmp_path)
    assert images.shape == (5, 28, 28) and labels.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal((images * 255).round().long(), torch.from_numpy(test))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", train)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(7))
    assert mnist(tmp_path)[0].shape == (12, 28, 28)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0" * 50)
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte: not a whole IDX file"):
        mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"junk")
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz: not readable"):
        mnist(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", train)
    content = bytearray((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    content[40:60] = bytes(20)  # damaged inside: not the file's head, but its compressed data
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz: not readable"):
        mnist(tmp_path)
    for images, labels in ((np.arange(7), np.arange(7)), (train, np.arange(6))):
        write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
        with pytest.raises(UserError, match="train-labels-idx1-ubyte.gz .*do not belong together"):
            mnist(tmp_path)
    with pytest.raises(UserError, match="no MNIST files; expected"):
        mnist(tmp_path / "absent")


def test_mnist_root_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("PAPERS_DATA", raising=False)
    with pytest.raises(UserError, match="needs --data-root FOLDER with the IDX files, or PAPERS_DATA"):
        load_data(Config(data="mnist"), 0)
    monkeypatch.setenv("PAPERS_DATA", str(tmp_path))
    with pytest.raises(UserError, match="mnist: no MNIST files"):
        load_data(Config(data="mnist"), 0)


@pytest.mark.parametrize("style", STYLES)
def test_skew_follows_its_recipe(style):
    data = skewed(*sklearn_digits(), style=style, rho=0.9, seed=1)
    values = STYLES[style][1]
    assert [len(client.train) for client in data.clients] == [150] * 8
    assert all(len(client.test) == 597 for client in data.clients)
    rules = []
    for client in data.clients:
        samples = client.test
        rule = [samples.attributes[samples.labels == y].mode().values.item() for y in range(10)]
        follows = (samples.attributes == torch.tensor(rule)[samples.labels]).float().mean().item()
        assert follows == pytest.approx(0.9 + 0.1 / values, abs=0.05)
        rules.append(tuple(rule))
    assert len(set(rules)) > 4  # the clients' rules contradict each other
    free = data.counterfactual
    agreement = (free.attributes == torch.tensor(rules[0])[free.labels]).float().mean().item()
    assert agreement == pytest.approx(1 / values, abs=0.08)
    # The same digits test everyone; training digits are nobody else's.
    assert torch.equal(data.clients[0].test.labels, data.unseen.labels)


def test_attribute_is_drawn_on_the_background_only():
    digits, labels = sklearn_digits()
    data = [skewed(digits, labels, noise=0.0, strength=s, seed=3).counterfactual.images for s in (0.0, 0.8)]
    ink = data[0][:, 0] == 1
    change = (data[1] - data[0]).abs().amax(1)
    assert change[ink].max() == 0 and change[data[0][:, 0] == 0].min() > 0


def test_same_seed_same_data_other_seed_other_rules():
    a, b, c = (skewed(*sklearn_digits(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.clients[3].train.images, b.clients[3].train.images)
    assert not torch.equal(a.clients[3].train.attributes, c.clients[3].train.attributes)


def test_too_few_digits():
    with pytest.raises(UserError, match="1797 digits cannot give"):
        load_data(Config(per_client=500), 0)


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(path)


def test_digits5_layout(tmp_path):
    shapes = {"MNIST": (28, 28), "SVHN": (32, 32, 3), "USPS": (16, 16), "SynthDigits": (32, 32, 3)}
    for name in DIGITS:
        shape = shapes.get(name, (28, 28, 3))
        labels = np.array([10, 1, 2]) if name == "SVHN" else np.array([0, 1, 2])
        pair = (np.full((3, *shape), 100, np.uint8), labels)
        dump(tmp_path / name / "test.pkl", pair)
        for part in range(2):
            dump(tmp_path / name / "partitions" / f"train_part{part}.pkl", pair)
    config = replace(PRESETS["digits5"], data_root=tmp_path, digit_parts=2)
    data = load_data(config, 0)
    assert [client.name for client in data.clients] == list(DIGITS)
    for client in data.clients:
        assert client.train.images.shape == (6, 3, 28, 28) and client.test.labels.tolist() == [0, 1, 2]
        assert (client.train.images == 100).all()
    held = load_data(replace(config, hold_out="SVHN"), 0)
    assert len(held.clients) == 4 and len(held.unseen) == 3
    with pytest.raises(UserError, match="--hold-out nowhere: the domains are MNIST"):
        load_data(replace(config, hold_out="nowhere"), 0)
    (tmp_path / "USPS" / "test.pkl").unlink()
    with pytest.raises(UserError, match="test.pkl: not found. Digits-5 is FedBN's digit_dataset.zip"):
        load_data(config, 0)


@pytest.mark.parametrize("content", [(1, 2), ([1], ["a"]), {"images": 3}, ([], [])])
def test_a_foreign_data_pickle_is_named(tmp_path, content):
    for name in DIGITS:
        dump(tmp_path / name / "partitions" / "train_part0.pkl", content)
    with pytest.raises(UserError, match="train_part0.pkl: expected"):
        load_data(replace(PRESETS["digits5"], data_root=tmp_path), 0)


SQUARES = np.zeros((2, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (SQUARES, [1, 25], "label 25; they are 0 to 9"),
        (SQUARES, [-1, 2], "label -1; they are"),
        (SQUARES, [1.7, 2.0], "whole numbers as labels, found .* float64"),
        (SQUARES, ["1", "2"], "whole numbers as labels, found .* <U1"),
        (SQUARES[..., None].repeat(4, -1), [1, 2], r"found uint8 \(2, 28, 28, 4\)"),
        (SQUARES[:, None].repeat(3, 1), [1, 2], r"found uint8 \(2, 3, 28, 28\)"),
    ],
)
def test_digits5_with_other_labels_or_images_is_refused(tmp_path, images, labels, message):
    dump(tmp_path / "MNIST" / "partitions" / "train_part0.pkl", (images, np.array(labels)))
    with pytest.raises(UserError, match=f"train_part0.pkl: .*{message}"):
        load_data(replace(PRESETS["digits5"], data_root=tmp_path), 0)


class Hostile:
    def __reduce__(self):
        return print, ("ran",)


def test_a_hostile_data_pickle_does_not_run(tmp_path, capsys):
    for name in DIGITS:
        dump(tmp_path / name / "partitions" / "train_part0.pkl", Hostile())
    with pytest.raises(UserError, match="refused, the pickle asks for builtins.print"):
        load_data(replace(PRESETS["digits5"], data_root=tmp_path), 0)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "folder", "names", "label", "number", "first"),
    [
        ("office", "office_caltech_10", OFFICE, "mug", 8, 4),
        ("domainnet", "DomainNet", DOMAINNET, "zebra", 9, 2),
    ],
)
def test_listed_photographs(tmp_path, preset, folder, names, label, number, first):
    count = 8 if preset == "office" else 40
    for name in names:
        for split, images in (("train", count), ("test", 2)):
            paths = [f"{folder}/{name}/{split}{i}.jpg" for i in range(images)]
            dump(tmp_path / folder / f"{name}_{split}.pkl", (paths, [label] * images))
            for path in paths:
                picture(tmp_path / path)
    config = replace(PRESETS[preset], data_root=tmp_path, image_size=16)
    data = load_data(config, 0)
    assert [client.name for client in data.clients] == list(names)
    assert all(len(c.train) == first and len(c.test) == 2 for c in data.clients)
    assert data.clients[0].train.labels.tolist() == [number] * first
    assert data.clients[0].train.images.shape[1:] == (3, 16, 16)
    broken = tmp_path / folder / names[1] / "test1.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(UserError, match="test1.jpg: not a readable image"):
        load_data(config, 0)
    dump(tmp_path / folder / f"{names[0]}_test.pkl", (["x.jpg"], ["spoon"]))
    with pytest.raises(UserError, match="unknown class 'spoon'"):
        load_data(config, 0)


def test_pacs_layout(tmp_path):
    for name in PACS:
        for split in ("train", "test"):
            lines = []
            for number, kind in enumerate(("dog", "person"), start=1):
                picture(tmp_path / "raw_images" / name / kind / f"{split} {number}.png", 50 * number)
                lines.append(f"{name}/{kind}/{split} {number}.png {1 if kind == 'dog' else 7}\n")
            (tmp_path / "label").mkdir(exist_ok=True)
            (tmp_path / "label" / f"{name}_{split}_kfold.txt").write_text("".join(lines))
    config = replace(PRESETS["pacs"], data_root=tmp_path, image_size=16)
    data = load_data(config, 0)
    assert [c.name for c in data.clients] == list(PACS) and data.clients[0].train.labels.tolist() == [0, 6]
    (tmp_path / "label" / "photo_test_kfold.txt").write_text("photo/dog/a.png 8\n")
    with pytest.raises(UserError, match="a label outside 1..7"):
        load_data(config, 0)


def test_folder_federation_with_attributes(tmp_path):
    rows = ["file,attribute"]
    for client in ("sensor a", "sensor b"):
        for split, number in (("train", 3), ("test", 2)):
            for kind in ("genuine", "attack"):
                for i in range(number):
                    picture(tmp_path / client / split / kind / f"{i}.png")
                    rows.append(f"{client}/{split}/{kind}/{i}.png,{'lit' if i else 'dark'}")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    picture(tmp_path / "empty" / "test" / "attack" / "0.png")
    rows.append("empty/test/attack/0.png,lit")
    for place in (
        ".git/objects/0a",
        "notes/2024/misc",
        "sensor a/val/zzz",
        "sensor a/train/.ipynb_checkpoints",
    ):
        picture(tmp_path / place / "0.png")  # neither clients nor classes
    config = replace(PRESETS["folder"], data_root=tmp_path, image_size=8)
    plain = load_data(config, 0)
    assert plain.attributes == 3 and plain.class_names == ("attack", "genuine")
    (tmp_path / "attributes.csv").write_text("\n".join(rows) + "\n")
    data = load_data(config, 0)
    assert data.attributes == 2 and [len(c.train) for c in data.clients] == [0, 6, 6]
    assert data.clients[1].train.attributes.tolist() == [0, 1, 1] * 2
    wrong = {
        b"sensor a/train/attack/0.png": "no attribute in the line of",
        b"\xff,x": "not readable as a table of attributes in UTF-8",
    }
    for line, message in wrong.items():
        (tmp_path / "attributes.csv").write_bytes("\n".join(rows).encode() + b"\n" + line + b"\n")
        with pytest.raises(UserError, match=message):
            load_data(config, 0)
    (tmp_path / "attributes.csv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(UserError, match="no attribute for empty/test/attack/0.png"):
        load_data(config, 0)
    (tmp_path / "attributes.csv").write_text("\n".join(rows[:4]) + "\nsensor b/train/att")
    with pytest.raises(UserError, match="attributes.csv: no attribute in the line of 'sensor b/train/att'"):
        load_data(config, 0)
    (tmp_path / "sensor b" / "test").rename(tmp_path / "sensor b" / "tests")
    with pytest.raises(UserError, match="sensor b: has train/ and no test/"):
        load_data(config, 0)
    with pytest.raises(UserError, match="no clients; expected"):
        load_data(replace(config, data_root=tmp_path / "absent"), 0)
    with pytest.raises(UserError, match="--data folder needs --data-root"):
        load_data(replace(config, data_root=None), 0)


def dfl_digits5(root):
    for i, name in enumerate(DIGITS):
        pair = (np.full((3, 28, 28), i, np.uint8), np.arange(3))
        dump(root / name / "test.pkl", pair)
        dump(root / name / "partitions" / "train_part0.pkl", pair)


SITES = {"digits5": dfl_digits5, "office": dfl_office, "pacs": dfl_pacs, "folder": dfl_folder}


@pytest.mark.parametrize("hold_out", [False, True])
@pytest.mark.parametrize("preset", SITES)
def test_a_site_needs_the_images_of_its_own_client_alone(tmp_path, preset, hold_out):
    SITES[preset](tmp_path)
    config = replace(PRESETS[preset], data_root=tmp_path, image_size=16, workers=0)
    if hold_out:
        config = replace(config, hold_out=load_data(config, 0).clients[0].name)
    whole = load_data(config, 0)
    own = whole.clients[-1]
    kept = {"digits5": own.name, "folder": own.name}.get(preset, f"*/{own.name}")
    pictures = [path for path in tmp_path.rglob("*.*") if path.suffix in (".png", ".jpg")]
    for path in [*pictures, *(tmp_path.rglob("t*.pkl") if preset == "digits5" else ())]:
        if not path.is_relative_to(next(tmp_path.glob(kept))):
            path.unlink()  # another site's
    if preset == "folder":
        (tmp_path / "attributes.csv").unlink()
    site = load_data(config, 0, own=(own.number,))
    assert [client.name for client in site.clients] == [client.name for client in whole.clients]
    assert site.class_names == whole.class_names and site.image_shape == whole.image_shape
    for ours, theirs in ((site.clients[-1].train, own.train), (site.clients[-1].test, own.test)):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
        assert len(ours) > 0
    assert not any(len(client.train) + len(client.test) for client in site.clients[:-1])
    nobody = load_data(config, 0, own=())
    assert nobody.image_shape == whole.image_shape and len(nobody.clients) == len(whole.clients)
    assert not any(len(client.train) + len(client.test) for client in nobody.clients)


def test_somebody_must_have_training_images(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / "only" / split / "attack" / "0.png")
    config = replace(PRESETS["folder"], data_root=tmp_path, image_size=8, hold_out="only")
    with pytest.raises(UserError, match="no client has training images"):
        load_data(config, 0)


def test_augmentation_is_a_function_of_its_numbers():
    images = torch.rand(2, 5, 3, 16, 16)
    still = torch.full((2, 5, 6), 0.5)
    still[..., 0] = 0.9
    assert torch.allclose(augment(images, still), images, atol=1e-5)
    flip = still.clone()
    flip[..., 0] = 0.1
    assert torch.allclose(augment(images, flip), images.flip(-1), atol=1e-5)
    view = torch.rand(2, 5, 6)
    turned = augment(images, view, degrees=30, zoom=0.7, jitter=0.2)
    assert torch.equal(turned, augment(images, view, degrees=30, zoom=0.7, jitter=0.2))
    assert turned.shape == images.shape and not torch.allclose(turned, images, atol=0.1)


# --- analysis -------------------------------------------------------------------------------------


def test_probes_find_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    y = torch.randint(0, 4, (600,))
    features = torch.nn.functional.one_hot(y, 4) + 0.1 * torch.randn(600, 4)
    assert probe_score(features, y) > 99
    assert probe_score(torch.randn(600, 4), y) < 40


def test_probe_samples_of_domains_are_mixed():
    data = replace(skewed(*sklearn_digits()), counterfactual=None)
    assert len(probe_samples(data, 500)) == 500
    assert len(set(probe_samples(data, 500).labels.tolist())) == 10


def test_sensitivity_of_a_linear_map_is_its_weights():
    torch.manual_seed(0)
    net = torch.nn.Linear(3 * 4 * 4, 5)
    weight = net.weight.detach().view(5, 3, 4, 4)

    def represent(net, state, x):
        return torch.func.functional_call(net, state, x.flatten(1))

    maps = sensitivity(represent, net, dict(net.named_parameters()), torch.rand(2, 3, 4, 4))
    assert torch.allclose(maps[0], weight.square().sum((0, 1)).sqrt(), atol=1e-5)
    ink = torch.zeros(2, 4, 4)
    assert background_share(maps, ink) == pytest.approx(1) and background_share(maps, ink + 1) == 0


def test_sensitivity_of_many_features_is_estimated():
    torch.manual_seed(0)
    net = torch.nn.Linear(3 * 4 * 4, 2000)
    exact = net.weight.detach().view(2000, 3, 4, 4).square().sum((0, 1)).sqrt()

    def represent(net, state, x):
        return torch.func.functional_call(net, state, x.flatten(1))

    maps = sensitivity(represent, net, dict(net.named_parameters()), torch.rand(2, 3, 4, 4))
    assert not torch.allclose(maps, exact.expand(2, -1, -1), rtol=1e-3)  # not a pass for each feature
    assert torch.allclose(maps, exact.expand(2, -1, -1), rtol=0.25)
    assert (maps / exact).mean().item() == pytest.approx(1, abs=0.05)
