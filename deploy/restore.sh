#!/bin/sh
# Restores Redis of the compose project to the newest second of the backup, or to the second that --at names:
#
#     deploy/restore.sh --at 2026-11-23T22:02:07Z
#
# It stops all services, restores, and starts them again. With the profile `cluster` it restores all nodes. The old data
# stays in the volumes as redis.lost-<time>.
#
# If it fails or is interrupted, nothing is lost: run it again. The old folders keep their name until all new ones are
# complete. Then renames follow: first all old folders, then all new ones. Until its new folder has the name, a server
# refuses to start. So old and new data never run together.
set -eu
cd "$(dirname "$0")/.."

in_volume_of() { of=$1; shift; docker compose run --rm --no-deps -T "$of" "$@"; }

docker image inspect imagegram >/dev/null 2>&1 || docker compose build -q api  # on a new machine there is no image yet
case $(docker compose config --services) in
  *ship6*) first=ship1 ships="ship1 ship2 ship3 ship4 ship5 ship6" to=/data/restored \
    servers="redis form node1 node2 node3 node4 node5 node6" ;;
  *) first=ship ships=ship to=/data/redis.new servers=redis ;;
esac
# shellcheck disable=SC2086  # lists of names
docker compose stop front api worker $ships $servers
in_volume_of $first rm -rf $to $to.part
in_volume_of $first imagegram-storage restore "$@" --to $to ||
  { echo "Not restored. The data has not changed. Start the services with: docker compose up -d --wait" >&2; exit 1; }
if [ $to = /data/restored ]; then
  # Each shard becomes a primary. The other nodes begin empty, and `form` makes them replicas.
  shards=$(in_volume_of $first ls $to)
  for ship in $ships; do
    in_volume_of "$ship" sh -c 'rm -rf /data/redis.new; mkdir -m 700 /data/redis.new'
    case " $shards " in *"${ship#ship}"*)
      in_volume_of $first tar -C "$to/${ship#ship}" -c . | in_volume_of "$ship" sh -c 'tar -C /data/redis.new -x && sync'
    esac
  done
  in_volume_of $first rm -r $to
fi
for ship in $ships; do
  in_volume_of "$ship" sh -c '[ ! -e /data/redis ] || mv /data/redis "/data/redis.lost-$(date -u +%Y%m%dT%H%M%SZ)"'
done
for ship in $ships; do
  in_volume_of "$ship" mv /data/redis.new /data/redis
done
docker compose up -d --wait
