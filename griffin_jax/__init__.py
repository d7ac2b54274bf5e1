"""GRIFFIN (arXiv 2404.01365) for JAX: faster answers from the feed-forward neurons a prompt needs."""

from griffin_jax.cache import EMPTY, KVCache, empty_cache
from griffin_jax.checkpoint import save
from griffin_jax.config import GriffinConfig, ModelConfig, Rotary, kept_neurons
from griffin_jax.generate import Answer, Prefilled, begin, bucket, decode, pad, prefill, refresh, teacher_forced
from griffin_jax.griffin import Experts, Statistics, magnitude, prune, select, token_statistic
from griffin_jax.llm import LLM, Generation, load
from griffin_jax.loading import ConversionReport, convert, load_model, open_source, plan, verify
from griffin_jax.lossless import Drafting, decode_lossless
from griffin_jax.model import FeedForward, Transformer
from griffin_jax.one_copy import OneCopy
from griffin_jax.planning import NarrowingWarning, Plan
from griffin_jax.prior import Prior
from griffin_jax.reconstruction import Reconstruction
from griffin_jax.sampling import Greedy, Sample
from griffin_jax.tokenizer import Tokenizer
from griffin_jax.verification import Verification, VerificationError

__version__ = "0.1.0"

__all__ = [
    "EMPTY",
    "LLM",
    "Answer",
    "ConversionReport",
    "Drafting",
    "Experts",
    "FeedForward",
    "Generation",
    "Greedy",
    "GriffinConfig",
    "KVCache",
    "ModelConfig",
    "NarrowingWarning",
    "OneCopy",
    "Plan",
    "Prefilled",
    "Prior",
    "Reconstruction",
    "Rotary",
    "Sample",
    "Statistics",
    "Tokenizer",
    "Transformer",
    "Verification",
    "VerificationError",
    "begin",
    "bucket",
    "convert",
    "decode",
    "decode_lossless",
    "empty_cache",
    "kept_neurons",
    "load",
    "load_model",
    "magnitude",
    "open_source",
    "pad",
    "plan",
    "prefill",
    "prune",
    "refresh",
    "save",
    "select",
    "teacher_forced",
    "token_statistic",
    "verify",
]
