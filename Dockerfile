# HeadSteer on NVIDIA GPUs, or on TPUs with --build-arg ACCELERATOR=tpu.
#   docker build -t headsteer .
#   docker run --gpus all -v "$PWD/runs:/work/runs" headsteer run --config=cifar100_vit_s --workdir=runs/cifar100
# JAX's wheels bring CUDA and cuDNN; the host needs its driver (580 or newer for CUDA 13) and nvidia-container-toolkit.
FROM python:3.12-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /work
COPY pyproject.toml README.md LICENSE ./
COPY headsteer_jax ./headsteer_jax
COPY configs ./configs
ARG ACCELERATOR=cuda
RUN pip install --no-cache-dir ".[${ACCELERATOR},prepare,hub,gcs]"
COPY benchmarks ./benchmarks

# what is downloaded and compiled outlasts the container where /work/runs is a volume
ENV TFDS_DATA_DIR=/work/runs/.tfds HF_HOME=/work/runs/.huggingface XDG_CACHE_HOME=/work/runs/.cache
# docker stop sends SIGTERM to the program itself, which saves and ends with code 75; give it time: --stop-timeout=120
ENTRYPOINT ["headsteer"]
