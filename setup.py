"""Packaging of lmjax. The versions it was tested with are in constraints.txt."""

import setuptools

EXTRAS = {
    # torch and transformers are the references of the parity tests; torch is pinned, for its wheel decides what else
    # is downloaded with it.
    "test": ["pytest>=8", "pytest-xdist", "hypothesis", "ruff", "torch==2.13.0", "transformers"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],
    # libtpu compiles for a described TPU topology on a machine that has none.
    "plan": ["jax[tpu]>=0.10.2"],
    # Optuna's Gaussian process is written with torch, and faster with greenlet.
    "sweeps": ["greenlet", "torch"],
    "hf": ["huggingface_hub", "transformers"],
    "tracking": ["wandb>=0.19.10", "trackio"],
}
EXTRAS["test"] += EXTRAS["plan"]  # Its tests compile.
# Everything but the accelerators' own builds, of which a machine wants the one it has; libtpu is here to compile with.
EXTRAS["all"] = sorted({*EXTRAS["test"], *EXTRAS["plan"], *EXTRAS["hf"], *EXTRAS["sweeps"], *EXTRAS["tracking"]})

setuptools.setup(
    name="lmjax",
    version="0.1.0",
    description="Language-model research in JAX and Flax: readable, exact, planned and scaled.",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["lmjax", "lmjax.*"]),
    entry_points={"console_scripts": ["lmjax = lmjax.__main__:main"]},
    install_requires=[
        "absl-py",
        "array_record",
        "etils[epath]",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib_resources",
        "jax>=0.10.2",
        "jinja2",
        "matplotlib",
        "ml-collections>=1.1",
        "numpy>=2",
        "optax>=0.2.8",
        "optuna>=5,<6",
        "orbax-checkpoint>=0.12.8",
        "pyarrow",
        "rouge-score",
        "sacrebleu",
        "safetensors",
        "scikit-learn",
        "scipy",
        "seqeval",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "threadpoolctl",
        "tokenizers",
        "tqdm",
    ],
    extras_require=EXTRAS,
)
