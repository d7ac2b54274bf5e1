"""A model on eight devices: `python examples/a_mesh.py`.

The CPU of this machine acts as eight devices, so the example runs anywhere, although no faster than on one device. If
you have eight accelerators, leave out the environment variables; if you have others, also change the mesh.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

import griffin_jax as gj


def main() -> None:
    """Answer a batch on a mesh that divides the batch in two and the model in four."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    llm = gj.load("smollm2-135m-instruct", mesh=mesh)
    down = llm.model.layers[0].ff.down[...]
    print(f"feed-forward rows of layer 0: {down.shape}, on each device {down.sharding.shard_shape(down.shape)}")

    out = llm.generate(["The tallest mountain on Earth is", "Once upon a time"], density=0.75, max_new_tokens=12)
    for text in out.texts:
        print(repr(text))
    print(f"{out.kept[0]} neurons kept of layer 0, {out.kept[0] // 4} on each device that shares the model")


if __name__ == "__main__":
    main()
