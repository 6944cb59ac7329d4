"""Students as transformers models; importing this package registers them with the Auto classes."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import transformers.utils.logging
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from needle.errors import DataError
from needle.student.architecture import Architecture
from needle.student.confidence import load_head, remove_head
from needle.student.decoder_only import DecoderOnlyNetwork, DecoderOnlySAN, DecoderOnlySANConfig
from needle.student.llama_style import LlamaStyle, LlamaStyleConfig, LlamaStyleNetwork
from needle.student.san import SANConfig, SANForConditionalGeneration, SimpleAttentionNetwork
from needle.student.t5_style import T5Style, T5StyleConfig, T5StyleNetwork
from needle.text.tokenizer import TextCodec

# A bar for a model that loads in a blink hides the lines that matter.
transformers.utils.logging.disable_progress_bar()
STUDENTS = {
    SANConfig: SANForConditionalGeneration,
    DecoderOnlySANConfig: DecoderOnlySAN,
    T5StyleConfig: T5Style,
    LlamaStyleConfig: LlamaStyle,
}
for _config, _model in STUDENTS.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForSeq2SeqLM.register(_config, _model, exist_ok=True)

__all__ = [
    "Architecture",
    "DecoderOnlyNetwork",
    "LlamaStyleNetwork",
    "SANConfig",
    "SANForConditionalGeneration",
    "SimpleAttentionNetwork",
    "T5StyleNetwork",
    "load",
    "save",
]

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "needle_text.json")


def load(folder: Path) -> tuple[PreTrainedModel, TextCodec]:
    """A saved student, in evaluation mode, with its tokenizer.

    Its `confidence_head` is the one that needle.calibrate fitted to it, or None: no part of the model, not moved with
    it and not saved with it.

    Raises:
        DataError: a file is missing, cut off or does not fit the others.
    """
    folder = Path(folder)
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} is not a student's folder: {', '.join(missing)} not there")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            wanted = AutoModelForSeq2SeqLM.from_config(config)
    except Exception as error:  # json, torch and transformers each raise their own
        raise DataError(f"{folder / 'config.json'} describes no student: {error}") from error
    if type(config) not in STUDENTS:
        known = ", ".join(one.model_type for one in STUDENTS)
        raise DataError(f"{folder} holds a {config.model_type} model, not one of {known}")
    _check_weights(folder / "model.safetensors", wanted.state_dict(), tied=wanted.all_tied_weights_keys)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, config=config, local_files_only=True)
    codec = TextCodec.load(folder)
    if codec.vocab_size != model.config.vocab_size:
        raise DataError(f"{folder}: tokenizer has {codec.vocab_size} pieces, the student {model.config.vocab_size}")
    head = load_head(folder)
    if head is not None and head.width != model.config.width:
        raise DataError(f"{folder / 'confidence.json'} has width={head.width}, the student {model.config.width}")
    # Bypasses nn.Module registration.
    object.__setattr__(model, "confidence_head", head)
    return model.eval(), codec


def _check_weights(path: Path, wanted: Mapping[str, Tensor], *, tied: Collection[str]) -> None:
    """Raises DataError when the file is damaged or holds other shapes than the model's. It reads the header only:
    transformers would print a table and fill what does not fit with random numbers. `tied` tensors are stored once."""
    try:
        with safe_open(path, framework="pt") as weights:
            stored = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own
        raise DataError(f"cannot read {path}: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    for name in sorted(shapes.keys() | stored.keys()):
        if shapes.get(name) != stored.get(name) and not (name in tied and name not in stored):
            raise DataError(
                f"{path} does not fit config.json beside it: {name} has shape {stored.get(name)}, the configuration "
                f"asks for {shapes.get(name)}"
            )


def save(model: PreTrainedModel, codec: TextCodec, folder: Path) -> None:
    """Writes weights (safetensors), configuration and tokenizer; `load` reads them back. A confidence head that the
    folder holds was fitted to the weights before, and goes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    remove_head(folder)
    model.save_pretrained(folder)
    codec.save(folder)
