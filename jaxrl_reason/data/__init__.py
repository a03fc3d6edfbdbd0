"""Data: sources of rows, prompt templates, tokenizers, and the batches that training and evaluation read."""

from jaxrl_reason.data.chat import ChatTemplate, chat_template
from jaxrl_reason.data.pipeline import PromptBatch, PromptStream, SolutionBatch, SolutionStream, eval_prompts
from jaxrl_reason.data.prompts import TEMPLATES, PromptTemplate, get_template
from jaxrl_reason.data.sources import Source, load_source, warn_of_repeats
from jaxrl_reason.data.tokenizer import Tokenizer, fitted, load_tokenizer, train_tokenizer

__all__ = [
    "ChatTemplate",
    "PromptBatch",
    "PromptStream",
    "PromptTemplate",
    "SolutionBatch",
    "SolutionStream",
    "Source",
    "TEMPLATES",
    "Tokenizer",
    "chat_template",
    "eval_prompts",
    "fitted",
    "get_template",
    "load_source",
    "load_tokenizer",
    "train_tokenizer",
    "warn_of_repeats",
]
