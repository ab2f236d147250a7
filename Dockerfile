# The service on ports 8000 (OpenEnv) and 7860 (a Space): one process, no root, nothing written but in /tmp.
#   docker build -t llmserve . && docker run -p 8000:8000 llmserve
# Behind a package index of one's own: docker build --secret id=pip,src=pip.conf [--secret id=ca,src=ca-bundle.pem] .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
RUN python3 -m venv --without-pip /opt/venv
WORKDIR /src
COPY requirements-server.lock ./
# Without pip's own compiling: the modules are compiled below, in a way that does not depend on file times.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --disable-pip-version-check \
        --no-deps --require-hashes --requirement requirements-server.lock
COPY pyproject.toml README.md LICENSE ./
COPY llmserve_env llmserve_env
COPY server server
COPY weights weights
RUN python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --disable-pip-version-check \
        --no-deps --no-index --no-build-isolation . \
    && find /opt/venv/lib/*/site-packages/numba /opt/venv/lib/*/site-packages/pandas \
        /opt/venv/lib/*/site-packages/matplotlib /opt/venv/lib/*/site-packages/scipy \
        -type d -name tests -prune -exec rm -rf {} + \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash -j 0 /opt/venv/lib
# Compiled for no CPU in particular, so that the cache holds wherever the image runs.
ENV NUMBA_CPU_NAME=generic NUMBA_CACHE_DIR=/opt/numba
RUN cd / && /opt/venv/bin/python -c "import llmserve_env as l; \
    episodes = [l.Episode(l.load_task(name)) for name in l.list_tasks()]; \
    [(e.reset(0), e.step(l.ServeAction()), l.grade(e.log())) for e in episodes]"

FROM ${BASE}
LABEL org.opencontainers.image.title="LLMServe" \
      org.opencontainers.image.description="An environment in which an agent runs an LLM inference service" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/numba /opt/numba
WORKDIR /app
COPY README.md openenv.yaml ./
# HOME: whichever uid runs this may have none. One BLAS thread: the simulator needs none, and pids may be limited.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CPU_NAME=generic \
    NUMBA_CACHE_DIR=/tmp/numba \
    OPENBLAS_NUM_THREADS=1 \
    GRADIO_ANALYTICS_ENABLED=False \
    ENABLE_WEB_INTERFACE=true \
    ENV_README_PATH=/app/README.md
USER 65532:65532
EXPOSE 8000 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Numba uses a cache only where it can write: it gets a copy. Further arguments of the server come after the image's name.
ENTRYPOINT ["/bin/sh", "-c", "cp -R /opt/numba /tmp/ && exec python -m server.app --host 0.0.0.0 --port 8000 --port 7860 \"$@\"", "start"]
