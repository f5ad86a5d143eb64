"""Files: images and grids, run folders with atomic checkpoints, logs and resume."""

import errno
import fcntl
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from shared.records import (
    plain,
    random_state,
    read_json,
    replacing,
    revive,
    set_random_state,
    write_json,
    write_tensors,
)
from shared.runtime import FULL_DISK, REPOSITORY, RunConfig, UserError, machine
from shared.weights import load_state, load_torch

SYNTHETIC_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for a picture made by a trained model."""

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
"""Of the image files that are looked for in folders."""

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
"""By which a video is told from a picture, and found in folders."""


def progress(iterable: Iterable | None = None, desc: str = "", total: int | None = None) -> tqdm:
    """tqdm on stderr; silent when that is not a terminal."""
    return tqdm(iterable, desc=desc, total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True)


# --- images ---------------------------------------------------------------------------------------


def find_images(
    folder: Path, subfolders: bool = True, endings: tuple[str, ...] = IMAGE_ENDINGS
) -> list[Path]:
    """The image files of a folder, and of those below it, sorted, without hidden ones; empty when none.
    endings: in small letters, of other files."""
    inside = folder.rglob("*") if subfolders else folder.glob("*")
    return sorted(
        path
        for path in inside
        if path.suffix.lower() in endings and not path.name.startswith(".") and path.is_file()
    )


def images_of(place: Path, subfolders: bool = True) -> list[Path]:
    """The image file that a path names, or all of the folder. Raises UserError when there is none."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{place}: no such picture or folder")
    found = find_images(place, subfolders)
    if not found:
        raise UserError(f"{place}: no pictures in this folder ({', '.join(IMAGE_ENDINGS)})")
    return found


def read_utf8(path: Path, what: str) -> str:
    """A text file in UTF-8, with or without the mark that spreadsheets begin with. what: it should be, for
    people. Raises UserError that names a missing file, and one that is no such text."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as {what} in UTF-8 ({error})") from None


def keep_inputs(inputs: Iterable[Path], results: Iterable[Path], option: str = "--out") -> None:
    """Raises UserError when a result would be written over a file that it is made from; asked before anything
    is computed. Results of an earlier call may be replaced."""
    written = {path.resolve() for path in results}
    for path in inputs:
        if path.resolve() in written:
            raise UserError(f"{path} would be overwritten by a result: give another {option}")


def read_image(path: Path | str, mode: str = "RGB") -> Tensor:
    """`read_pixels` as float32 in [0, 1]."""
    return read_pixels(path, mode).float().div_(255)


def read_pixels(path: Path | str, mode: str = "RGB") -> Tensor:
    """Image file -> (C, H, W) uint8. mode: PIL's, e.g. RGB (3 channels) or L (1).

    16-bit grey files are scaled by 65535; photos are turned upright as their metadata say.
    Raises UserError that names a missing, unreadable or damaged file, or one of floating-point numbers.
    """
    path = Path(path)
    try:
        with Image.open(path) as opened:
            if opened.mode == "F":  # PIL would cut it off at 255 whatever its range is
                raise UserError(f"{path}: holds floating-point numbers; save it with 8 or 16 bits")
            ImageOps.exif_transpose(opened, in_place=True)
            if opened.mode.startswith("I;16") or opened.mode == "I":
                grey = np.asarray(opened, dtype=np.float32) / 65535
                opened = Image.fromarray((grey * 255).round().clip(0, 255).astype(np.uint8))
            array = np.array(opened.convert(mode))
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}); remove or replace it") from None
    if array.ndim == 2:
        array = array[..., None]
    return torch.from_numpy(array).permute(2, 0, 1)


def read_photo(path: Path) -> tuple[Tensor, list[str]]:
    """A user's own picture -> (3, H, W) in [0, 1], upright, and remarks: grey is repeated, what is
    transparent is laid on white. Raises what `read_image` raises."""
    image, remarks = read_image(path), []
    with Image.open(path) as opened:
        ImageOps.exif_transpose(opened, in_place=True)
        if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
            alpha = torch.from_numpy(np.array(opened.convert("RGBA"))[..., 3]).float() / 255
            image = image * alpha + (1 - alpha)
            remarks.append(f"{path.name}: transparent parts are shown on white")
        elif opened.mode in ("1", "L", "I") or opened.mode.startswith("I;"):
            remarks.append(f"{path.name}: a grey picture; the network was trained on colour")
    return image, remarks


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) or (H, W) in [0, 1], C = 1 or 3 -> 8-bit PIL image; values outside are clipped."""
    array = image.detach().float().cpu().clamp(0, 1).mul(255).round().byte().numpy()
    if array.ndim == 3:
        array = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
    return Image.fromarray(array)


def write_image(path: Path | str, image: Tensor, synthetic: str | None = None) -> None:
    """Write (C, H, W) in [0, 1] as .png or .jpg, through a temporary name.

    synthetic: says in the file's metadata that a model made the picture, and how. Raises UserError on
    another ending.
    """
    path = Path(path)
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".png":
        options["format"] = "PNG"
        if synthetic:
            options["pnginfo"] = info = PngImagePlugin.PngInfo()
            info.add_text("DigitalSourceType", SYNTHETIC_SOURCE)
            info.add_text("Description", f"synthetic image: {synthetic}")
    elif path.suffix.lower() in (".jpg", ".jpeg"):
        options.update(format="JPEG", quality=95)
        if synthetic:
            options["comment"] = f"synthetic image: {synthetic} ({SYNTHETIC_SOURCE})".encode()
    else:
        raise UserError(f"{path}: pictures are written as .png or .jpg")
    with replacing(path) as temporary:
        to_pil(image).save(temporary, **options)


def image_grid(
    images: Tensor | Iterable[Tensor],
    columns: int | None = None,
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
    scale: int = 1,
    gap: int = 2,
) -> Tensor:
    """Images of one size, (N, C, H, W) or a list of (C, H, W) in [0, 1] -> one (3, H', W') sheet on white.

    Filled row by row; scale: whole-number enlargement of small images; labels stand left and above.
    """
    tiles = [tile.detach().float().cpu() for tile in images]
    tiles = [(tile[None] if tile.ndim == 2 else tile).expand(3, *tile.shape[-2:]) for tile in tiles]
    if scale > 1:
        tiles = [tile.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for tile in tiles]
    height, width = tiles[0].shape[-2:]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    font = ImageFont.load_default(12)
    left = 6 + math.ceil(max(font.getlength(label) for label in row_labels)) if row_labels else 0
    top = 18 if column_labels else 0
    sheet = torch.ones(3, top + rows * (height + gap) - gap, left + columns * (width + gap) - gap)
    for number, tile in enumerate(tiles):
        y, x = top + number // columns * (height + gap), left + number % columns * (width + gap)
        sheet[:, y : y + height, x : x + width] = tile
    if not (row_labels or column_labels):
        return sheet
    canvas = to_pil(sheet)
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels or []):
        draw.text((2, top + row * (height + gap) + height // 2), label, "black", font, anchor="lm")
    for column, label in enumerate(column_labels or []):
        draw.text((left + column * (width + gap) + width // 2, 2), label, "black", font, anchor="ma")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255


# --- run folders ----------------------------------------------------------------------------------


def runs_root() -> Path:
    """Where run folders live: the environment's PAPERS_RUNS, otherwise runs/ in the repository."""
    return Path(os.environ.get("PAPERS_RUNS", REPOSITORY / "runs"))


class Run:
    """A run folder: config.json, log.jsonl and TensorBoard events, checkpoint/, samples/.

    Opening it again with the same configuration continues it; a run that has written nothing yet takes a new
    one. Only the main process writes; every process reads. Raises UserError when the folder holds a run with
    other settings, is in use, or is something else.
    """

    def __init__(self, paper: str, config: RunConfig, is_main: bool = True):
        self.folder = (config.out or runs_root() / paper / f"{config.preset}-{config.seed}").resolve()
        self.samples = self.folder / "samples"
        self.is_main = is_main
        self._writer: SummaryWriter | None = None
        self._log = None
        self._step = -1
        if is_main:
            self._open(paper, config)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def _open(self, paper: str, config: RunConfig) -> None:
        described = {"paper": paper, "config": plain(config), "training": machine(config.device != "cpu")}
        record = self.folder / "config.json"
        # A process killed while it wrote its first record leaves the record's temporary name behind.
        own = (".lock", f".{record.name}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            entries = [entry for entry in self.folder.iterdir() if entry.name not in own]
            if entries and not record.exists():  # before the lock: nothing of ours stays in a foreign folder
                raise UserError(f"{self.folder}: not empty and not a run folder; give another --out")
            self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            raise UserError(f"{self.folder}: no run folder ({error.strerror}); give another --out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder}: another process is training here; wait for it or give another --out"
            ) from None
        if config.restart:
            # The record last: until then a process killed here leaves a run folder.
            for entry in sorted(self.folder.iterdir(), key=lambda entry: entry == record):
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if record.exists():
            before = read_record(self.folder)
            _check_same(self.folder, before, described)
            if not _is_blank(self.folder):  # who asks a finished run again has not trained it
                described["training"] = before["training"]
        write_json(record, described)
        self.samples.mkdir(exist_ok=True)
        _recover(self.folder)

    def load(self, models: dict[str, nn.Module], objects: Mapping[str, Any] | None = None) -> dict | None:
        """Continue from the checkpoint, if there is one: weights, objects, random state and log position.

        models, objects: as given to `save`. Returns the saved `progress`, or None in a fresh run. Raises
        UserError on a damaged checkpoint or one of another model.
        """
        folder = _checkpoint(self.folder)
        state = None
        if folder is not None:
            state = _read_state(folder)
            for name, model in models.items():
                load_safetensors(folder / f"{name}.safetensors", model, exact=True)
            with foreign_state(folder / "state.pt"):
                for name, holder in (objects or {}).items():
                    holder.load_state_dict(state["objects"][name])
                set_random_state(state["random"])
                self._step = int(state["log_step"])
        if self.is_main:
            log = self.folder / "log.jsonl"
            log.touch()
            if state and log.stat().st_size < state["log_bytes"]:
                raise UserError(f"{log}: lines before the checkpoint are gone; --restart begins again")
            # What was logged after the checkpoint is computed and logged again.
            os.truncate(log, state["log_bytes"] if state else 0)
            self._log = open(log, "a")  # noqa: SIM115 - open as long as the run
            purge = state["log_step"] + 1 if state else 0
            self._writer = SummaryWriter(str(self.folder), purge_step=purge)
        return state["progress"] if state else None

    def save(self, models: dict[str, nn.Module], objects: Mapping[str, Any] | None, progress: dict) -> None:
        """Write checkpoint/: one safetensors file per model and state.pt. Killed at any moment, the folder
        still holds either the former checkpoint or this one, whole.

        objects: things with `state_dict()` made of tensors, numbers, strings, lists and dicts (optimisers,
        schedulers, averages). progress: where the loop stands, e.g. {"step": 100}.
        """
        if not self.is_main:
            return
        new, current, old = _stages(self.folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        state = {
            "objects": {name: holder.state_dict() for name, holder in (objects or {}).items()},
            "progress": progress,
            "random": random_state(),
            "log_bytes": self._log.tell() if self._log else 0,
            "log_step": self._step,
        }
        try:
            for name, model in models.items():
                save_file(_detached(model), new / f"{name}.safetensors")
            torch.save(state, new / "state.pt")
        except (SafetensorError, RuntimeError) as error:
            # Neither library passes the system's error number on.
            full = "No space left" in str(error) or shutil.disk_usage(new).free < 2**20
            shutil.rmtree(new)
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new)) from error
            raise
        for path in new.iterdir():
            _sync(path)
        _sync(new)
        if current.exists():
            current.rename(old)
        new.rename(current)
        _sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def log(self, step: int, **scalars: float) -> None:
        """One line to log.jsonl and TensorBoard. No clock readings: a resumed log must be the same."""
        if not self.is_main:
            return
        values = {name: float(value) for name, value in scalars.items()}
        self._step = step
        self._log.write(json.dumps({"step": step, **values}) + "\n")
        self._log.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image: Tensor, synthetic: str | None = None) -> None:
        """Write samples/<name>.png, (C, H, W) in [0, 1], and show it in TensorBoard. synthetic: as for
        `write_image`."""
        if not self.is_main:
            return
        write_image(self.samples / f"{name}.png", image, synthetic)
        self._writer.add_image(name, image.detach().float().cpu().clamp(0, 1), max(self._step, 0))

    def close(self) -> None:
        """Flush the logs and let another process have the folder."""
        if self.is_main:
            if self._writer:
                self._writer.close()
            if self._log:
                self._log.close()
            self._lock.close()


def find_run(paper: str, run: Path | None = None) -> Path:
    """The run folder to evaluate: `run`, or the paper's newest one. UserError when there is none."""
    if run is not None:
        if not (run / "config.json").is_file():
            raise UserError(f"{run}: not a run folder (no config.json); train.py prints the folder it wrote")
        found = read_record(run)["paper"]
        if found != paper:
            raise UserError(f"{run}: a run of {found}, not of {paper}")
        return run.resolve()
    root = runs_root() / paper
    records = sorted(root.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not records:
        raise UserError(f"no run in {root}: run train.py first, or name a run folder with --run")
    return records[-1].parent


def read_record(folder: Path) -> dict:
    """config.json of a run folder: {"paper": str, "config": settings, "training": by which command, where;
    None in one of an older version}. UserError when it is damaged."""
    form = (
        "a run's settings",
        lambda found: {key: found[key] for key in ("paper", "config")} | {"training": found.get("training")},
    )
    return read_json(folder / "config.json", *form, "train again with --restart or another --out")


def load_config(folder: Path, config_class: type) -> Any:
    """config.json of a run folder -> `config_class`. UserError when it was written by another version."""
    values = read_record(folder)["config"]
    try:
        return revive(values, config_class)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: does not fit this version's settings ({error})") from None


def load_weights(folder: Path, models: dict[str, nn.Module]) -> dict:
    """Weights of a run's checkpoint into `models`; returns the saved progress. UserError when not there."""
    checkpoint = _checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{folder}: no checkpoint yet; let train.py run until it has written one")
    for name, model in models.items():
        load_safetensors(checkpoint / f"{name}.safetensors", model)
    return _read_state(checkpoint)["progress"]


def load_safetensors(path: Path, module: nn.Module, exact: bool = False) -> None:
    """A safetensors file into a module, strictly. exact: in the module's own precision too, see `load_state`.
    UserError on a missing, damaged or foreign file."""
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from None
    load_state(module, state, path, prefixes=(), exact=exact)


def save_safetensors(path: Path, module: nn.Module) -> None:
    """A module's weights as a safetensors file; its folder is made."""
    write_tensors(path, _detached(module))


def _checkpoint(folder: Path) -> Path | None:
    # Between the two renames of `save` only checkpoint.old has the former, still valid, state.
    for name in ("checkpoint", "checkpoint.old"):
        if (folder / name).is_dir():
            return folder / name
    return None


def _detached(model: nn.Module) -> dict[str, Tensor]:
    # Cloned one by one, because safetensors refuses tensors that share memory.
    form = torch.contiguous_format
    return {key: value.detach().cpu().clone(memory_format=form) for key, value in model.state_dict().items()}


def _stages(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "checkpoint.new", folder / "checkpoint", folder / "checkpoint.old"


def _recover(folder: Path) -> None:
    """Tidy up after a kill in the middle of `Run.save`."""
    new, current, old = _stages(folder)
    if old.exists() and not current.exists():
        old.rename(current)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def foreign_state(path: Path) -> Iterator[None]:
    """Within it what a saved state is put into refuses it by whatever error: UserError, a state of another
    run."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = repr(error) if isinstance(error, LookupError) else str(error)
        raise UserError(
            f"{path}: the checkpoint of another run ({reason}); --restart begins again, --out elsewhere"
        ) from None


_STATE = {"objects", "progress", "random", "log_bytes", "log_step"}
"""What `Run.save` writes."""


def _read_state(checkpoint: Path) -> dict:
    state = load_torch(checkpoint / "state.pt")
    if not isinstance(state, dict) or _STATE - state.keys():
        raise UserError(f"{checkpoint / 'state.pt'}: not a checkpoint of this project")
    return state


_MAY_DIFFER = {"out", "restart", "device", "compile", "workers"}


def _is_blank(folder: Path) -> bool:
    """Whether a run ended before it wrote anything but its settings, for a mistake in them perhaps, so that
    it may begin again with others."""
    made = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return all(path.name in ("config.json", ".lock") or path.match("events.out.*") for path in made)


def _check_same(folder: Path, before: dict, now: dict) -> None:
    if before["paper"] != now["paper"]:
        raise UserError(f"{folder}: a run of {before['paper']}, not of {now['paper']}; give another --out")
    old, new = before["config"], now["config"]
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in changed if key not in _MAY_DIFFER]
    if changed and not _is_blank(folder):
        raise UserError(
            f"{folder}: holds a run with other settings ({'; '.join(changed)}). "
            "Give another --out, or --restart to delete it"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
