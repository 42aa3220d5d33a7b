# diptych serve in a container, as an unprivileged user.
#
#   docker build -t diptych .                                             CPU
#   docker build -t diptych:cuda --build-arg VARIANT=cuda .               NVIDIA GPUs (docker run --gpus all)
#   docker run -p 127.0.0.1:8000:8000 diptych                             bagel/tiny at http://127.0.0.1:8000
#   docker run -p 8000:8000 -v $PWD/keys:/run/keys:ro diptych bagel/tiny --api-key-file /run/keys
ARG VARIANT=cpu

FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

FROM base AS torch-cpu
RUN pip install "torch>=2.13,<2.14" --index-url https://download.pytorch.org/whl/cpu

FROM base AS torch-cuda
RUN pip install "torch>=2.13,<2.14"

FROM torch-${VARIANT}
# libraries that skia loads
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libegl1 libfontconfig1 \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /src/
COPY diptych /src/diptych
RUN pip install "/src[serve,hf]" && rm -rf /src \
    && useradd --create-home --uid 10001 diptych && install -d -o diptych -g diptych /home/diptych/.cache
USER diptych
WORKDIR /home/diptych
VOLUME /home/diptych/.cache
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=3s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["diptych", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["bagel/tiny"]
