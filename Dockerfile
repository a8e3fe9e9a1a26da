# An image with the server. Mount the folder of a run, and one with the token file:
#
#   docker build --tag hyperadapters .
#   docker run --publish 8000:8000 --volume ./runs/helpdesk:/run-folder --volume ./tokens.txt:/tokens.txt:ro hyperadapters
#
# The backbone is read from the Hub when the server starts, unless the run names a folder that is mounted too.
FROM python:3.12-slim

RUN useradd --create-home --uid 10001 server
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY recipes ./recipes
COPY src ./src
# The build argument chooses another build of PyTorch, for example one for CPUs only, which is smaller.
ARG TORCH="torch==2.13.0"
RUN pip install --no-cache-dir "$TORCH" && pip install --no-cache-dir --constraint constraints.txt '.[serve]'

USER server
ENV HF_HOME=/home/server/cache TOKENIZERS_PARALLELISM=false
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["hyperadapters", "serve", "/run-folder", "--host", "0.0.0.0"]
CMD ["--token-file", "/tokens.txt"]
