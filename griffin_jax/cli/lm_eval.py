"""`griffin-jax lm-eval`: lm-evaluation-harness with the model griffin_jax."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> None:
    """Runs the harness's own command line, with griffin_jax as the default of its --model.

    Args:
        arguments: those of `lm-eval`.

    Raises:
        ImportError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-evaluation-harness is not installed: pip install 'griffin-jax[lm-eval]'")
    from lm_eval import utils
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from griffin_jax.evaluation.lm_eval import NAME

    utils.setup_logging()
    cli, own = HarnessCLI(), sys.argv
    # The harness reads its arguments from sys.argv only.
    sys.argv = ["lm-eval", *arguments]
    try:
        options = cli.parse_args()
    finally:
        sys.argv = own
    if getattr(options, "model", NAME) is None:
        file = {} if options.config is None else EvaluatorConfig.load_yaml_config(options.config)
        options.model = file.get("model", NAME)
    cli.execute(options)
