# An image for GPUs. Not built or run so far; docs/guides/slurm.md says how the job template uses it.
#
#   docker build -t megatron_muloco .
#
# Python 3.12 of Ubuntu 24.04, a compiler for Triton's and DeepSpeed's kernels, and pinned packages.
# CUDA's run-time libraries, NCCL and cuDNN come with torch. Under SLURM the repository is mounted
# at its own path and comes before the copy in the image, so a change of code needs no new image.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/muloco
ENV PATH=$VIRTUAL_ENV/bin:$PATH
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /opt/megatron_muloco
COPY requirements/cuda-py312.txt requirements/
RUN pip install --no-cache-dir -r requirements/cuda-py312.txt

COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_muloco megatron_muloco
COPY launch launch
COPY configs configs
COPY tools tools
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

# Megatron overlaps tensor-parallel communication only with one hardware queue (before Blackwell).
ENV CUDA_DEVICE_MAX_CONNECTIONS=1
CMD ["python", "launch/pretrain.py", "--help"]
