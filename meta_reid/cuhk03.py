"""CUHK03's release, one MATLAB file, written out as images under the names that its split lists use."""

import shutil
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image

from shared.io import progress
from shared.runtime import UserError


def extract(release: Path, folder: Path) -> None:
    """Write the labelled boxes of `cuhk-03.mat` as {pair}_{identity:03d}_{view}_{image:02d}.png, losslessly.

    The file is MATLAB 7.3, that is HDF5: `labeled` lists five camera pairs, each (identities, 10) images, the
    first five by its first camera, empty where there are fewer. HDF5 has all dimensions in reverse. The
    folder appears when it is complete, so that several processes may extract at once; one that is there
    stays. Raises UserError when the file is not readable as this or the folder cannot be written.
    """
    import h5py  # here, because nothing else needs it

    part = folder.with_name(f".{folder.name}-{uuid4().hex}")
    try:
        part.mkdir()
        with h5py.File(release) as file:
            pairs = [file[pair][()].T for pair in file["labeled"][0]]
            people = [(n, i, row) for n, pair in enumerate(pairs, 1) for i, row in enumerate(pair, 1)]
            for pair, identity, cells in progress(people, f"{release.name} -> {folder.name}"):
                for number, cell in enumerate(cells, 1):
                    picture = file[cell][()].T
                    if picture.ndim == 3:  # an empty cell holds its size, a vector
                        name = f"{pair}_{identity:03d}_{1 if number <= 5 else 2}_{number:02d}.png"
                        Image.fromarray(np.ascontiguousarray(picture)).save(part / name)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
    except (IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"CUHK03: cannot extract {release} to {folder} ({error!r})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
