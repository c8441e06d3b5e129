# An image for GPU nodes: CUDA, NCCL and torch out of the base image, and this package with its engines.
#
#   docker build -t longnet .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 longnet longnet doctor --ranks 8
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 longnet make -C /opt/lightning-longnet gpu GPU_PYTHON=python
#
# `--ipc host` is for NCCL's and the loaders' shared memory, `--ulimit memlock=-1` for InfiniBand.  Over several nodes add
# `--network host --device /dev/infiniband`, and start `longnet fit` with torchrun or SLURM as docs/training.md shows.
# BASE must hold the torch of constraints.txt.  `--build-arg FLASH=1` compiles flash-attn, which takes an hour.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${BASE}

ARG EXTRAS=deepspeed,hf,images,plots
ARG FLASH=0
ARG MAX_JOBS=8

# the base image's Python may belong to its distribution, which then lets pip change it only with this
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# git and make for `make gpu`, the rest for NCCL over InfiniBand
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lightning-longnet

# the dependencies in a layer of their own, which changes of the sources keep.  torch is the base image's: it must be that
# of constraints.txt, or pip would replace it by a build that may not fit the image's CUDA
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lightning_longnet/__init__.py lightning_longnet/__init__.py
RUN python -c "import re, torch; pinned = re.search(r'^torch==(\S+)', open('constraints.txt').read(), re.M)[1]; assert torch.__version__.split('+')[0] == pinned, f'BASE has torch {torch.__version__}, constraints.txt {pinned}'" \
    && python -m pip install -c constraints.txt ".[${EXTRAS}]" pytest hypothesis \
    && python -m pip uninstall -y lightning-longnet
RUN if [ "${FLASH}" = 1 ]; then MAX_JOBS=${MAX_JOBS} python -m pip install --no-build-isolation "flash-attn>=2.8"; fi

COPY . .
RUN python -m pip install --no-deps -c constraints.txt -e . \
    && python -c "import lightning_longnet.strategies"

RUN useradd --create-home trainer && chown -R trainer /opt/lightning-longnet
USER trainer
WORKDIR /home/trainer
CMD ["longnet", "doctor"]
