# The panel's image: code and environment under /opt/rigpanel, nothing else. docker-compose.yml says who runs what.
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/rigpanel
# Its own layer: an upgrade that changes only code does not install anything.
COPY bootstrap.py requirements.lock ./
RUN python3 bootstrap.py && useradd --system --uid 10001 --home-dir /data rigpanel \
    && install -d -o rigpanel -g rigpanel -m 700 /data /data/secrets /models /release
COPY . .
USER rigpanel
ENV RIGPANEL_DATA_DIR=/data RIGPANEL_HOST=0.0.0.0
VOLUME /data
ENTRYPOINT ["/opt/rigpanel/.venv/bin/python"]
CMD ["manage.py", "up"]
