"""Students as transformers models; importing this package registers them with the Auto classes."""

from pathlib import Path

import transformers.utils.logging
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from needle.errors import DataError
from needle.student.san import SANConfig, SANForConditionalGeneration, SimpleAttentionNetwork
from needle.text.tokenizer import TextCodec

# A bar for a model that loads in a blink hides the lines that matter.
transformers.utils.logging.disable_progress_bar()
AutoConfig.register("needle_san", SANConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(SANConfig, SANForConditionalGeneration, exist_ok=True)

__all__ = ["SANConfig", "SANForConditionalGeneration", "SimpleAttentionNetwork", "load", "save"]

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "needle_text.json")


def load(folder: Path) -> tuple[SANForConditionalGeneration, TextCodec]:
    """A saved student, in evaluation mode, with its tokenizer.

    Raises:
        DataError: a file is missing, cut off or does not fit the others.
    """
    folder = Path(folder)
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} is not a student's folder: {', '.join(missing)} not there")
    try:
        model, report = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # safetensors, json and transformers each raise their own
        raise DataError(f"cannot load the student in {folder}: {error}") from error
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:
        raise DataError(f"the weights in {folder} do not fit its config.json: {wrong[0]} and {len(wrong) - 1} more")
    codec = TextCodec.load(folder)
    if codec.vocab_size != model.config.vocab_size:
        raise DataError(f"{folder}: tokenizer has {codec.vocab_size} pieces, the student {model.config.vocab_size}")
    return model.eval(), codec


def save(model: SANForConditionalGeneration, codec: TextCodec, folder: Path) -> None:
    """Writes weights (safetensors), configuration and tokenizer; `load` reads them back."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    codec.save(folder)
