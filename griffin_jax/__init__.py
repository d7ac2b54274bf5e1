"""GRIFFIN (arXiv 2404.01365) for JAX: faster answers from the feed-forward neurons a prompt needs."""

from griffin_jax.checkpoints.loading import ConversionReport, convert, load_model, open_source, plan, verify
from griffin_jax.checkpoints.native import save
from griffin_jax.checkpoints.planning import NarrowingWarning, Plan
from griffin_jax.checkpoints.verification import Verification, VerificationError
from griffin_jax.extensions.in_place import OneCopy
from griffin_jax.extensions.prior import Prior
from griffin_jax.extensions.reconstruction import Reconstruction
from griffin_jax.extensions.refresh import refresh
from griffin_jax.extensions.speculative import Drafting, decode_lossless
from griffin_jax.generation.decode import Answer, begin, decode
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled, prefill
from griffin_jax.generation.sampling import Greedy, Sample
from griffin_jax.generation.scoring import teacher_forced
from griffin_jax.griffin.config import GriffinConfig, kept_neurons
from griffin_jax.griffin.neurons import Experts
from griffin_jax.griffin.prune import prune
from griffin_jax.griffin.select import magnitude, select
from griffin_jax.griffin.statistic import Statistics, token_statistic
from griffin_jax.llm.llm import LLM, Generation, load
from griffin_jax.model.cache import EMPTY, KVCache, empty_cache
from griffin_jax.model.config import ModelConfig, Rotary
from griffin_jax.model.feed_forward import FeedForward
from griffin_jax.model.transformer import Transformer
from griffin_jax.text.tokenizer import Tokenizer

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
