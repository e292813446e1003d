#!/bin/sh
# Restores Redis of the compose project to the newest second of the backup, or to the second that --at names:
#
#     deploy/restore.sh --at 2026-11-23T22:02:07Z
#
# It stops all services, restores, and starts them again. The old data stays in the volume as redis.lost-<time>.
#
# If it fails or is interrupted, nothing is lost: run it again. The old folder keeps its name until the new one is
# complete. Then two renames follow. Between them there is no folder `redis`, and the redis service refuses to start.
set -eu
cd "$(dirname "$0")/.."

in_ship() { docker compose run --rm --no-deps -T ship "$@"; }

docker image inspect imagegram >/dev/null 2>&1 || docker compose build -q api  # on a new machine there is no image yet
docker compose stop front api worker ship redis
in_ship sh -c 'rm -rf /data/redis.new /data/redis.new.part'
in_ship imagegram-storage restore "$@" --to /data/redis.new ||
  { echo "Not restored. The data has not changed. Start the services with: docker compose up -d --wait" >&2; exit 1; }
in_ship sh -c 'if [ -e /data/redis ]; then mv /data/redis "/data/redis.lost-$(date -u +%Y%m%dT%H%M%SZ)"; fi
  mv /data/redis.new /data/redis'
docker compose up -d --wait
