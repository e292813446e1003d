#!/bin/sh
# Restores Redis of the compose project: to the newest second of the backup, or with `--at 2026-11-23T22:02:07Z`.
# Stops all services before, and starts them after. The data that was there is kept beside, as redis.lost-<time>.
#
# When it fails or is interrupted, nothing is lost: run it again. Until the new folder has its name, the old one keeps it.
# Between these two moments there is no folder, and then the redis service refuses to start.
set -eu
cd "$(dirname "$0")/.."

in_ship() { docker compose run --rm --no-deps -T ship "$@"; }

docker image inspect imagegram >/dev/null 2>&1 || docker compose build -q api  # a new machine
docker compose stop front api worker ship redis
in_ship sh -c 'rm -rf /data/redis.new /data/redis.new.part'
in_ship imagegram-storage restore "$@" --to /data/redis.new ||
  { echo "Not restored. The data is as it was; docker compose up -d starts it again." >&2; exit 1; }
in_ship sh -c 'if [ -e /data/redis ]; then mv /data/redis "/data/redis.lost-$(date -u +%Y%m%dT%H%M%SZ)"; fi
  mv /data/redis.new /data/redis'
docker compose up -d --wait
