# docker build -t rec .
# docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 -v "$PWD/savedmodels:/work/savedmodels:ro" rec
#
# Every command of rec is in it: `docker run --rm -v "$PWD:/work" --user "$(id -u)" rec train --stage all`.

FROM python:3.12-slim-bookworm AS build
RUN python -m venv /opt/rec
WORKDIR /src
COPY requirements.lock .
RUN /opt/rec/bin/pip install --no-cache-dir --require-hashes --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY rec rec
COPY config config
RUN /opt/rec/bin/pip install --no-cache-dir --no-deps . && /opt/rec/bin/pip uninstall --yes pip

FROM python:3.12-slim-bookworm
COPY --from=build /opt/rec /opt/rec
# Nothing is written outside of /work and /tmp.
ENV PATH=/opt/rec/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin rec && install --directory --owner rec /work
USER 10001
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["rec"]
CMD ["serve", "--host", "0.0.0.0"]
