# Two images of one file: 'operator' (no torch) and 'trainer'. 'make images' builds both.
#
# BASE may be any image with Python 3.11 or newer, or a bare Debian, which then gets its own Python. The default is an
# index of images for amd64, arm64 and others: 'docker buildx imagetools inspect python:3.11-slim-bookworm' names the newest.
ARG BASE=python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b

# ------------------------------------------------------------------------------------- what both run on

FROM ${BASE} AS python
RUN if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || [ ! -d /usr/share/ca-certificates ]; \
    then \
      apt-get update -qq \
      && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends python3 ca-certificates > /dev/null \
      && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/*.log /var/log/apt; \
    fi \
    # Some libraries ask for the name and home of whoever runs them.
    && echo 'qlora:x:65532:65532::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'qlora:x:65532:' >> /etc/group
# The root file system may be read-only: /tmp is the only place that is written to, and bytecode is compiled here.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
WORKDIR /tmp

# ----------------------------------------------------------------------------------- where packages are put together

FROM python AS build
# What a build needs to know of its surroundings; nothing of it is in the images.
ARG PIP_CERT
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN if ! python3 -c 'import ensurepip' 2> /dev/null; \
    then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends python3-venv > /dev/null; \
    fi \
    && python3 -m venv /opt/uv
WORKDIR /src
# Every file that is installed has a hash here.
COPY constraints.txt .
RUN sed -n '/^uv==/,/[^\\]$/p' constraints.txt > uv.txt \
    && /opt/uv/bin/pip install --quiet --no-cache-dir --disable-pip-version-check --no-deps --require-hashes --requirement uv.txt
ENV UV_LINK_MODE=copy \
    UV_PYTHON=/opt/venv/bin/python \
    UV_CONSTRAINT=constraints.txt \
    UV_BUILD_CONSTRAINT=constraints.txt
# Python starts isolated (-I) and takes no PYTHONPATH: a line in its own site-packages says where our packages are.
RUN /opt/uv/bin/uv venv --quiet --python python3 /opt/venv \
    && echo /opt/qlora > "$(python -c 'import site; print(site.getsitepackages()[0])')/qlora.pth"

# Which package in which version, and nothing else: a change that leaves these alone installs nothing again.
FROM build AS requirements
ARG SSL_CERT_FILE
ARG UV_CACHE_DIR=/tmp/uv
ARG UV_DEFAULT_INDEX
ARG UV_INDEX
ARG UV_FIND_LINKS
# cpu: PyTorch's own build without CUDA, from PyTorch's own index. Unset: the index's build, which brings CUDA.
ARG UV_TORCH_BACKEND
# Empty: without the clients of MLflow, Weights & Biases and TensorBoard (spec.tracking).
ARG TRACKING="--extra tracking"
# Empty: without lm-evaluation-harness (spec.evaluate).
ARG EVALUATE="--extra evaluate"
COPY pyproject.toml ./
# Without the databases that Optuna can keep a study in: the operator keeps none (docs/decisions/0028).
RUN /opt/uv/bin/uv pip compile --quiet --no-header --no-annotate --group operator --output-file operator.txt \
       --no-emit-package alembic --no-emit-package mako --no-emit-package sqlalchemy \
    && /opt/uv/bin/uv pip compile --quiet --no-header --no-annotate --extra trainer $TRACKING $EVALUATE pyproject.toml \
       --output-file trainer.txt

# Compiled once, here; 'unchecked': a start looks at no source again. The generated classes of the Kubernetes client are
# left out: nothing imports them, and they would be a third of the image.
FROM build AS operator-build
ARG SSL_CERT_FILE
ARG UV_CACHE_DIR=/tmp/uv
ARG UV_DEFAULT_INDEX
ARG UV_INDEX
ARG UV_FIND_LINKS
COPY --from=requirements /src/operator.txt .
RUN /opt/uv/bin/uv pip install --quiet --no-deps --require-hashes --requirements operator.txt \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x '/client/(models|api)/|/numpy/.*/tests/' /opt/venv
COPY api/qlora_api /opt/qlora/qlora_api
COPY memory/qlora_memory /opt/qlora/qlora_memory
COPY operator/qlora_operator /opt/qlora/qlora_operator
COPY sweep/qlora_sweep /opt/qlora/qlora_sweep
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/qlora

FROM build AS trainer-build
ARG SSL_CERT_FILE
ARG UV_CACHE_DIR=/tmp/uv
ARG UV_DEFAULT_INDEX
ARG UV_INDEX
ARG UV_FIND_LINKS
ARG UV_TORCH_BACKEND
COPY --from=requirements /src/trainer.txt .
# PyTorch's own index has builds of torch that no hash is known of: with UV_TORCH_BACKEND, torch alone goes unchecked.
# torch/testing has syntax of newer Pythons.
RUN if [ -n "$UV_TORCH_BACKEND" ]; \
    then sed -i '/^torch==/,/[^\\]$/ { s/ \\$//; /--hash/d }' constraints.txt; \
    else export UV_REQUIRE_HASHES=1; \
    fi \
    && /opt/uv/bin/uv pip install --quiet --no-deps --requirements trainer.txt \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x /torch/testing/ /opt/venv
COPY api/qlora_api /opt/qlora/qlora_api
COPY memory/qlora_memory /opt/qlora/qlora_memory
COPY storage/qlora_storage /opt/qlora/qlora_storage
COPY trainer/qlora_trainer /opt/qlora/qlora_trainer
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/qlora

# ------------------------------------------------------------------------------------------------------- the images

FROM python AS operator
LABEL org.opencontainers.image.title="qlora-operator" \
      org.opencontainers.image.description="Serves QLoRAJobs on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=operator-build /opt/venv /opt/venv
COPY --from=operator-build /opt/qlora /opt/qlora
USER 65532:65532
ENTRYPOINT ["python", "-I", "-u", "-m", "qlora_operator"]

FROM python AS trainer
LABEL org.opencontainers.image.title="qlora-trainer" \
      org.opencontainers.image.description="Prepares and trains QLoRAJobs, and publishes their adapters" \
      org.opencontainers.image.licenses="Apache-2.0"
# What the NVIDIA container runtime mounts: the driver, and NVML to read memory by.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=trainer-build /opt/venv /opt/venv
COPY --from=trainer-build /opt/qlora /opt/qlora
USER 65532:65532
ENTRYPOINT ["python", "-I", "-u", "-m", "qlora_trainer"]
