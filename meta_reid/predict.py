"""Find persons in your own pictures: index a gallery folder, then search it with query images.

    python predict.py --gallery DIR --index site.safetensors     # build an index
    python predict.py --query person.jpg --index site.safetensors     # search it; both in one call do too

Ranked lists are written as pictures and JSON, with the source domain that each query looks like most.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from meta_reid.aggregation import Aggregation
from meta_reid.data import Files
from meta_reid.figures import BLUE, framed
from meta_reid.gallery import Index, fingerprint
from meta_reid.items import Item
from meta_reid.model import META, load_official
from meta_reid.protocols import embed, prepare
from meta_reid.rows import plan
from meta_reid.train import Config, trained_on
from shared.io import find_run, image_grid, images_of, keep_inputs, load_config, load_weights, write_image
from shared.ranges import Count, Natural, Positive
from shared.records import write_json
from shared.runtime import UserError, parse, pick_device, run_main

IDENTITIES = {767: "CUHK03", 1467: "CUHK03", 11934: "CUHK-SYSU", 1041: "MSMT17", 4101: "MSMT17"}
IDENTITIES |= dict.fromkeys((751, 1501, 1502), "Market1501")
"""Identities of a source, its training part or all of it -> the source."""
PRINTED = 20
"""Queries whose answers are printed; all are written."""


@dataclass(frozen=True)
class Network:
    """Which trained network, and how it joins its experts."""

    run: Path | None = None
    """Run folder with the weights. Default: the newest."""
    official: Path | None = None
    """Checkpoint of the official trainer, instead of a run."""
    row: str | None = None
    """Which row of the run. Default: its first META row."""
    aggregation: Aggregation | None = None
    """Aggregation mode. Default: the network's own."""
    temperature: Positive = 1.0
    """Divides what enters the softmax of the weights, as in eval.py."""
    normalize_parts: bool = False
    """Give mixture and global feature length 1 before they are joined, as in eval.py."""


@dataclass(frozen=True)
class Options(Network):
    """Gallery, queries and weights."""

    gallery: Path | None = None
    """Folder of person crops to index (searched through all its folders)."""
    query: Path | None = None
    """Image or folder of images to look for."""
    index: Path = Path("gallery.safetensors")
    """Index file: written with --gallery, otherwise read."""
    out: Path = Path("results")
    """Folder for ranked lists: one picture for each query, and results.json."""
    top: Count = 10
    """Length of the ranked lists."""
    faiss: bool = False
    """Search with FAISS (must be installed)."""
    batch: Count = 64
    """Images per forward pass."""
    workers: Natural = 0
    """Data-loading processes."""
    device: str = "auto"
    """auto, cpu or cuda."""


def official_sources(model: META) -> list[str]:
    """Names of an official checkpoint's sources. It holds none; known numbers of identities tell them."""
    heads = [getattr(model, f"heads_Expert{k}") for k in range(1, model.K + 1)]
    numbered = [f"expert {k}" for k in range(1, model.K + 1)]
    names = [IDENTITIES.get(head.classifier.out_features) or numbered[k] for k, head in enumerate(heads)]
    return names if len(set(names)) == len(names) else numbered


def load_model(options: Network) -> tuple[META, list[str], tuple[int, int], str]:
    """Network with the options' aggregation, names of its sources, image size, where the weights are from."""
    model, *about = _read(options)
    model.aggregation = options.aggregation or model.aggregation
    model.temperature, model.normalize_parts = options.temperature, options.normalize_parts
    return model, *about


def _read(options: Network) -> tuple[META, list[str], tuple[int, int], str]:
    if options.official is not None:
        model = load_official("meta_r50_3experts", options.official)
        return model, official_sources(model), (256, 128), str(options.official)
    folder = find_run("meta_reid", options.run)
    config: Config = load_config(folder, Config)
    names, classes = trained_on(folder, config)
    rows = plan(config, classes)
    position = load_weights(folder, {row.name: row.model for row in rows})
    meta = [row for row in rows if row.config.method == "meta"]
    chosen = [row for row in meta if options.row in (None, row.name)]
    if not meta:
        raise UserError(f"{folder}: a run without a row of META; it has {', '.join(r.name for r in rows)}")
    if not chosen:
        raise UserError(f"--row {options.row}: META's rows in the run are {', '.join(r.name for r in meta)}")
    if rows.index(chosen[0]) >= position["row"]:
        raise UserError(
            f"{folder}: {chosen[0].name} is not trained yet; repeat the train command to continue the run"
        )
    return chosen[0].model, names, (config.height, config.width), f"{folder} {chosen[0].name}"


def describe_files(
    model: META, paths: list[Path], size: tuple[int, int], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, 2C), weights of the experts (N, K) and summed relevance distances (N, K) of files."""

    def everything(images: Tensor) -> tuple[Tensor, ...]:
        described = model.describe(images)
        return model.joined(described), model.expert_weights(described), described.relevance.sum(-1)

    files = Files([Item(path, 0, 0) for path in paths], size)
    return embed(everything, files, pick_device(options.device), options.batch, options.workers)


def ranked_list(query: Path, found: list[str], similarity: list[float], size: tuple[int, int]) -> Tensor:
    """Picture of a query in blue and what was found, with its similarities."""
    files = Files([Item(Path(file), 0, 0) for file in [str(query), *found]], size)
    tiles = [framed(files[i][0] / 255, BLUE if i == 0 else (1.0, 1.0, 1.0)) for i in range(len(files))]
    labels = ["query", *(f"{value:.2f}" for value in similarity)]
    return image_grid(tiles, len(tiles), column_labels=labels, scale=2 if size[1] < 64 else 1)


def joining(options: Network, model: META) -> str:
    """How embeddings are joined, in words: the aggregation, and what differs from the defaults."""
    said = [model.aggregation]
    if options.temperature != 1:
        said.append(f"temperature {options.temperature:g}")
    if options.normalize_parts:
        said.append("normalized parts")
    return ", ".join(said)


def picture_of(out: Path, number: int, query: Path) -> Path:
    """Where the ranked list of a query goes."""
    return out / f"{number:04d}-{query.stem}.png"


def make_places(options: Options, known: list[Path], queries: list[Path]) -> None:
    """Folders of what will be written, before the network runs. known, queries: the gallery's images and
    those to look for, none of which may be written over. Raises UserError or OSError where nothing can be
    written."""
    if known:
        if options.index.is_dir():
            raise UserError(f"--index {options.index}: a folder; give the name of a file")
        keep_inputs([*known, *queries], [options.index], "--index")
        options.index.parent.mkdir(parents=True, exist_ok=True)
    if queries:
        made = [picture_of(options.out, number, path) for number, path in enumerate(queries)]
        keep_inputs([*known, *queries], made)
        options.out.mkdir(parents=True, exist_ok=True)


def main() -> None:
    """Index, search, or both."""
    options = parse(Options, __doc__)
    if options.gallery is None and options.query is None:
        raise UserError("nothing to do: give --gallery to build an index, --query to search one, or both")
    known = images_of(options.gallery) if options.gallery is not None else []
    queries = images_of(options.query) if options.query is not None else []
    make_places(options, known, queries)
    model, names, size, weights_from = load_model(options)
    prepare(model, pick_device(options.device))
    how = joining(options, model)
    maker = fingerprint(model, how)
    if known:
        embeddings = describe_files(model, known, size, options)[0]
        Index.of(embeddings, [str(path) for path in known], weights_from, maker).save(options.index)
        print(f"{len(known)} images indexed in {options.index}")
    if not queries:
        return
    index = Index.load(options.index)
    if index.maker != maker:
        raise UserError(
            f"{options.index}: built with other weights or another --aggregation, --temperature or "
            f"--normalize-parts ({index.model}, {index.maker.partition(' ')[2]}) than the queries would be "
            f"({weights_from}, {how}); give the same ones, or build the index anew with --gallery"
        )
    embeddings, weights, distances = describe_files(model, queries, size, options)
    similarity, order = index.search(embeddings, options.top, options.faiss)
    answers, pictures = [], []
    for number, path in enumerate(queries):
        found = [index.paths[column] for column in order[number].tolist()]
        near = similarity[number].tolist()
        pictures.append((path, found, near))
        answers.append(
            {
                "query": str(path),
                "looks_like": names[int(distances[number].argmin())],
                "distance": dict(zip(names, distances[number].tolist(), strict=True)),
                "weight": dict(zip(names, weights[number].tolist(), strict=True)),
                "found": [
                    {"path": file, "similarity": value} for file, value in zip(found, near, strict=True)
                ],
            }
        )
        if number < PRINTED:
            looks = answers[-1]["looks_like"]
            print(f"{path}: looks like source {looks}; nearest {found[0]} ({near[0]:.2f})")
    if len(queries) > PRINTED:
        print(f"and {len(queries) - PRINTED} more queries, all in {options.out / 'results.json'}")
    write_json(options.out / "results.json", {"weights": weights_from, "queries": answers})
    # Last, for they read the gallery's files again, and one may be gone.
    for number, (path, found, near) in enumerate(pictures):
        write_image(picture_of(options.out, number, path), ranked_list(path, found, near, size))
    print(options.out)


if __name__ == "__main__":
    run_main(main)
