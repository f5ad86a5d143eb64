"""Released weights, read without running what is in the files.

rosinality's and e4e's `.pt`, NVIDIA's `.pkl`, OpenAI's and open_clip's CLIP, IR-SE50, Light CNN, and the
checkpoints of the AnyFace++ release. Where to get each stands in the README.
"""

import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyface.clip import CLIP, clip_from_state
from anyface.encoder import E4E
from anyface.model import FlatMapper, Memory, load_official
from anyface.stylegan2 import Generator
from shared.runtime import UserError
from shared.weights import load_pickle, load_state, load_torch


class Stored:
    """An object of NVIDIA's pickles: its class's name and its attributes. Source text in it is not run."""

    def __init__(self, meta: dict[str, Any]):
        self.class_name, self.state = meta["class_name"], meta["state"]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers by name, as `state_dict` would give them."""
        found = {}
        for kind in ("_parameters", "_buffers"):
            found |= {prefix + k: v.detach() for k, v in self.state[kind].items() if v is not None}
        for name, module in self.state["_modules"].items():
            if isinstance(module, Stored):
                found |= module.tensors(f"{prefix}{name}.")
        return found


class _EasyDict(dict):
    """Stand-in for dnnlib.util.EasyDict."""


class _Unread:
    """Stand-in for numpy's types and functions: nothing here needs their values, and numpy trusts what a
    pickle says of memory."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def read_nvidia(path: Path) -> dict[str, Any]:
    """An NVIDIA network pickle (stylegan2-ada-pytorch) -> its entries, networks as `Stored`.

    Only tensors, plain values and these stand-ins are made (numpy's values come as empty ones); whatever else
    the pickle names is refused with a UserError.
    """
    replace: dict[str, Any] = {
        "torch_utils.persistence._reconstruct_persistent_obj": Stored,
        "dnnlib.util.EasyDict": _EasyDict,
        "torch.storage._load_from_bytes": _storage,
        "numpy.dtype": _Unread,
        "numpy.ndarray": _Unread,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        replace[f"{module}.scalar"] = replace[f"{module}._reconstruct"] = _Unread
    allowed = (
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "collections.OrderedDict",
        "builtins.set",
    )
    entries = load_pickle(path, allowed, replace)
    if not isinstance(entries, dict) or not isinstance(entries.get("G_ema"), Stored):
        raise UserError(f"{path}: no NVIDIA network pickle (no G_ema of stylegan2-ada-pytorch's form in it)")
    return entries


def nvidia_to_rosinality(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names and shapes of NVIDIA's generator -> rosinality's, with `latent_avg`. Values stay as they are."""
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("resample_filter"):
            continue
        if name == "mapping.w_avg":
            state["latent_avg"] = value
        elif found := re.fullmatch(r"mapping\.fc(\d+)\.(weight|bias)", name):
            state[f"style.{int(found[1]) + 1}.{found[2]}"] = value
        elif name == "synthesis.b4.const":
            state["input.input"] = value[None]
        elif found := re.fullmatch(r"synthesis\.b(\d+)\.(conv0|conv1|torgb)\.(.+)", name):
            level, layer, rest = int(found[1]).bit_length() - 1, found[2], found[3]
            if layer == "torgb":
                target = "to_rgb1" if level == 2 else f"to_rgbs.{level - 3}"
            else:
                target = "conv1" if level == 2 else f"convs.{2 * (level - 3) + int(layer[-1])}"
            if rest == "noise_const":
                number = 0 if level == 2 else 2 * level - 5 + int(layer[-1])
                state[f"noises.noise_{number}"] = value[None, None]
            elif rest == "weight":
                state[f"{target}.conv.weight"] = value[None]
            elif rest.startswith("affine."):
                state[f"{target}.conv.modulation.{rest.removeprefix('affine.')}"] = value
            elif rest == "noise_strength":
                state[f"{target}.noise.weight"] = value.reshape(1)
            elif rest == "bias" and layer == "torgb":
                state[f"{target}.bias"] = value.reshape(1, 3, 1, 1)
            elif rest == "bias":
                state[f"{target}.activate.bias"] = value
            else:
                raise UserError(f"{path}: {name} has no counterpart in this generator")
        else:
            raise UserError(f"{path}: {name} has no counterpart in this generator")
    return state


def generator_from_state(state: dict[str, Tensor], path: Path) -> Generator:
    """A generator of the sizes that a state dict in rosinality's names tells."""
    try:
        levels = len({key.split(".")[1] for key in state if key.startswith("to_rgbs.")})
        channels = {4: state["input.input"].shape[1]}
        for i in range(levels):
            channels[8 * 2**i] = state[f"convs.{2 * i}.conv.weight"].shape[1]
        n_mlp = len([key for key in state if re.fullmatch(r"style\.\d+\.weight", key)])
        style_dim = state["conv1.conv.modulation.weight"].shape[1]
    except KeyError as error:
        raise UserError(
            f"{path}: no StyleGAN2 generator in rosinality's names ({error} is missing)"
        ) from None
    except IndexError:
        raise UserError(f"{path}: no StyleGAN2 generator (weights of odd dimensions)") from None
    return Generator(4 * 2**levels, style_dim, n_mlp, channels=channels)


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """A state dict as it is. UserError for anything else."""
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict of tensors")
    return state


def _fill(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The filters are constants, which some files leave out."""
    own = module.state_dict()
    return state | {k: v for k, v in own.items() if k.endswith("kernel") and k not in state}


def generator_state(path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """rosinality's `.pt`, NVIDIA's `.pkl` or a plain state dict -> (state in rosinality's names, mean w).
    UserError when the file holds no state dict."""
    if path.suffix == ".pkl":
        network = read_nvidia(path)["G_ema"]
        try:
            labels, tensors = network.state.get("c_dim"), network.tensors()
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{path}: G_ema in it is no network as NVIDIA stores them ({error!r})") from None
        if isinstance(labels, int) and labels:
            raise UserError(f"{path}: a generator with class labels; AnyFace needs one without")
        state = nvidia_to_rosinality(tensors, path)
        return _tensors(state, path), state.pop("latent_avg", None)
    content = load_torch(path)
    if isinstance(content, dict) and "g_ema" in content:
        return _tensors(content["g_ema"], path), content.get("latent_avg")
    if isinstance(content, dict) and "state_dict" in content:
        return _under(content["state_dict"], "decoder.", path), content.get("latent_avg")
    return _tensors(content, path), None


def _under(state: Any, prefix: str, path: Path) -> dict[str, Tensor]:
    """The part of a state dict whose names begin with a prefix, without it."""
    state = _tensors(state, path)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_generator(path: Path) -> tuple[Generator, Tensor]:
    """A generator of whatever size the file holds, in eval mode, and its mean w+ (1, n_latent, style_dim).

    Takes rosinality's `.pt` (g_ema and latent_avg), NVIDIA's `.pkl` and e4e's `.pt`. Without a mean in the
    file, that of 4,096 draws.
    """
    state, mean = generator_state(path)
    network = generator_from_state(state, path)
    load_state(network, _fill(network, state), path)
    network.eval().requires_grad_(False)
    if mean is None:
        mean = network.mean_latent(generator=torch.Generator().manual_seed(0))
    width, count = network.style_dim, network.n_latent
    if not isinstance(mean, Tensor) or mean.numel() not in (width, count * width):
        raise UserError(f"{path}: latent_avg is no mean code of {width} numbers, or of {count} x {width}")
    mean = mean.float().reshape(1, -1, width).expand(1, count, -1)
    return network, mean.contiguous()


def clip_state(path: Path) -> dict[str, Tensor]:
    """OpenAI's TorchScript archive, or a state dict (open_clip's), as float32 tensors by OpenAI's names.

    What is called .safetensors is read as that and as nothing else.
    """
    content = load_torch(path) if path.suffix == ".safetensors" else _archive(path)
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    content = _tensors(content, path)
    notes = ("input_resolution", "context_length", "vocab_size")
    return {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in content.items()
        if key not in notes
    }


def _archive(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but it is the form that OpenAI publishes.
            warnings.simplefilter("ignore", FutureWarning)
            script = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError):
        return load_torch(path)
    return script.state_dict()


def load_clip(path: Path) -> CLIP:
    """CLIP with a vision transformer, of whatever size the file holds, frozen and in eval mode."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    state = clip_state(path)
    try:
        network = clip_from_state(state)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: no CLIP with a vision transformer in OpenAI's names ({error})") from None
    load_state(network, state, path)
    return network.eval().requires_grad_(False)


def load_e4e(path: Path) -> tuple[E4E, Tensor]:
    """`e4e_ffhq_encode.pt` -> encoder in eval mode and the mean code (1, n_latent, 512) to add."""
    content = load_torch(path)
    if not isinstance(content, dict) or not {"state_dict", "latent_avg"} <= content.keys():
        raise UserError(f"{path}: not an e4e checkpoint (state_dict and latent_avg expected)")
    state = _under(content["state_dict"], "encoder.", path)
    n_latent = len({key.split(".")[1] for key in state if key.startswith("styles.")})
    network = E4E(n_latent)
    load_state(network, state, path)
    mean = content["latent_avg"].float()
    return network.eval().requires_grad_(False), mean.reshape(1, -1, 512).expand(1, n_latent, -1)


def load_memory(path: Path) -> Memory:
    """`memory_N.pt` of the release: 26 tensors (K_i, E), a list or one tensor (26, K, E)."""
    banks = load_torch(path)
    if isinstance(banks, dict):
        banks = list(banks.values())
    listed = isinstance(banks, (list, tuple, Tensor))
    if (
        not listed
        or not all(isinstance(bank, Tensor) and bank.ndim == 2 for bank in banks)
        or len({bank.shape[1] for bank in banks}) != 1
    ):
        raise UserError(f"{path}: no memory; one tensor (slots, width) for each of its banks is expected")
    return Memory(list(banks))


def load_release(path: Path, bf16: bool = False) -> FlatMapper:
    """`iteration_N.pt` of the AnyFace++ release -> its mapper, the one part that inference uses.

    The weights stay in the file until they are read; bf16: then they take half the memory. UserError when the
    file holds another network.
    """
    state = _part(path, "I_map.")
    first = state.get("mapping.0.weight")
    if first is None or first.ndim != 2 or not len(first) or len(first) % 512:
        raise UserError(
            f"{path}: no AnyFace++ checkpoint (I_map.mapping.0.weight is missing or of odd width)"
        )
    depth = len([key for key in state if key.endswith(".weight")])
    with torch.device("meta"):
        network = FlatMapper(first.shape[1], len(first) // 512, 512, depth)
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in network.state_dict().items()}:
        raise UserError(f"{path}: no AnyFace++ checkpoint (its I_map is more than linear layers in a row)")
    network.load_state_dict(state, assign=True)
    return network.to(torch.bfloat16 if bf16 else torch.float32).eval().requires_grad_(False)


def _part(path: Path, prefix: str) -> dict[str, Tensor]:
    content = load_torch(path, mmap=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return _under(content, prefix, path) or content


def load_light_cnn(path: Path) -> nn.Module:
    """Light CNN 9 or 29 v2, whichever the file holds, in eval mode. UserError for neither."""
    nine = any(key.endswith("features.0.filter.weight") for key in _part(path, ""))
    return load_official("lightcnn9" if nine else "lightcnn29v2", path)


PREFIXES = {
    "anyface_T_map": "T_map.",
    "anyfacepp_I_map": "I_map.",
    "anyfacepp_CA_NET": "CA_NET.",
    "e4e_encoder_1024": "encoder.",
}


def load_into(network: nn.Module, name: str, path: Path) -> None:
    """Fill `official(name)` from its released file, whatever wraps it. UserError lists what does not fit."""
    if name.startswith("stylegan2_generator"):
        state = _fill(network, generator_state(path)[0])
    elif name.startswith("stylegan2_discriminator"):
        content = load_torch(path)
        state = content["d"] if isinstance(content, dict) and "d" in content else content
        state = _fill(network, _tensors(state, path))
    elif name.startswith("openai_clip"):
        state = clip_state(path)
    else:
        state = _part(path, PREFIXES.get(name, ""))
    load_state(network, state, path)
