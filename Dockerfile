# One image for API, worker and backup. The command of the container chooses the part.

FROM python:3.11.16-slim-bookworm AS build
# pillow-simd is compiled with these headers. Without those of liblcms2 it would silently lack colour management.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libjpeg62-turbo-dev zlib1g-dev liblcms2-dev libseccomp2
WORKDIR /app
COPY .ci/setup .ci/setup
COPY pyproject.toml setup.cfg requirements.lock ./
COPY api api
COPY storage storage
COPY workers workers
COPY lua lua
RUN .ci/setup run

FROM python:3.11.16-slim-bookworm
# 999 is also the user of the valkey image. Only their owner may read Redis' files, and the shipper must read them.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libjpeg62-turbo zlib1g liblcms2-2 libseccomp2 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 999 --create-home imagegram \
    && install -d -o imagegram -g imagegram /data /store /backup
WORKDIR /app
COPY --from=build /app /app
USER 999
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 IMAGEGRAM_HOST=0.0.0.0 IMAGEGRAM_DATA=/data \
    IMAGEGRAM_STORE=file:///store IMAGEGRAM_BACKUP_STORE=file:///backup
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["imagegram-api"]
