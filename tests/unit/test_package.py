"""What `import griffin_jax` gives, what it loads, and the names of version 0.1."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import random_model
from griffin_jax.utils.deprecation import GriffinDeprecationWarning

PACKAGE = Path(gj.__file__).parent


def loaded_by(statement: str) -> set[str]:
    """The modules that a new process has after a statement."""
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing():
    assert not {"jax", "flax", "numpy", "transformers"} & loaded_by("import griffin_jax")
    assert not {"jax", "flax", "numpy", "transformers"} & loaded_by("import griffin_jax.cli.main")


def test_lower_levels_load_no_higher_ones():
    higher = {"griffin", "text", "generation", "checkpoints", "extensions", "llm", "aot", "bench", "evaluation", "cli"}
    found = loaded_by("import griffin_jax.model.transformer, griffin_jax.model.sharding")
    assert "griffin_jax.model.config" in found
    assert not {name for name in found if name.startswith("griffin_jax.") and name.split(".")[1] in higher}
    assert "transformers" not in found


def test_type_checkers_see_the_names_that_there_are():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {node.module: {name.name for name in node.names} for node in checked.body}
    assert imported == {f"griffin_jax.{module}": set(names.split()) for module, names in gj._NAMES.items()}
    assert set(gj.__all__) <= set(dir(gj))
    for name in gj.__all__:
        assert getattr(gj, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gj.nothing


@pytest.mark.parametrize("old", gj._RENAMED)
def test_names_of_version_0_1(old):
    with pytest.warns(GriffinDeprecationWarning, match=rf"griffin_jax\.{old} .* griffin_jax\.{gj._RENAMED[old]}"):
        assert getattr(gj, old) is getattr(gj, gj._RENAMED[old])


@pytest.mark.parametrize("module", ["jitted", "harness"])
def test_modules_of_version_0_1(module):
    with pytest.warns(GriffinDeprecationWarning):
        found = getattr(
            importlib.import_module(f"griffin_jax.{module}"), {"jitted": "decode", "harness": "GriffinLM"}[module]
        )
    assert found is not None


@pytest.mark.thorough
def test_arguments_of_version_0_1():
    config = gj.ModelConfig("llama", 32, 16, 24, 2, 2, 2, 8, 64)
    model = random_model(config)
    tokens, lengths = jnp.ones((1, 4), jnp.int32), jnp.full((1,), 4)
    with pytest.warns(GriffinDeprecationWarning, match=r"room.*max_new_tokens"):
        prefilled = gj.prefill(model, tokens, lengths, room=4)
    with pytest.warns(GriffinDeprecationWarning, match=r"room.*max_new_tokens"):
        assert prefilled.room == prefilled.max_new_tokens == 4
    state = jitted.init_decode(prefilled)
    with pytest.warns(GriffinDeprecationWarning, match=r"answer.*state"):
        assert gj.decode(model, answer=state, until=2).count == 2
    with pytest.raises(TypeError, match="room"):
        gj.prefill(model, tokens, lengths, room=4, max_new_tokens=4)
