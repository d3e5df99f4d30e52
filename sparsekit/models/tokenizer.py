"""The tokenizer that lies beside the weights of a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint; none of its own code is run.

    Raises:
        DataError: There is none, it cannot be loaded, or it has no words.
    """
    from transformers import AutoTokenizer

    hint = "copy its files there, or pass token rows: --calibration or --text FILE.safetensors"
    if not any((folder / file).is_file() for file in FILES):
        raise DataError(f"{folder} has no tokenizer", hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DataError(f"the tokenizer in {folder} cannot be loaded: {reason}", hint) from error
    # For several architectures transformers 5 builds one without any file, and it has no words:
    # every text would be empty.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(f"{folder} has no tokenizer: its vocabulary is empty", hint)
    return tokenizer
