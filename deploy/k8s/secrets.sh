#!/bin/sh
# Creates the Secrets with the passwords of Redis and the key that signs tokens, all of them random:
#
#     deploy/k8s/secrets.sh | kubectl apply -f -
#
# Run again it makes new ones. docs/production.md says what must restart then.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
umask 077
cd "$(dirname "$0")"
cp users.acl "$folder/users.acl"

secret() { # NAME ARGUMENT…
  name=$1; shift
  kubectl create secret generic "$name" --namespace imagegram --dry-run=client --output yaml "$@"
  echo ---
}
random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; } # nothing that a URL must encode

for user in api worker ship operator replica; do
  random >"$folder/$user"
  sed "s/CHANGE-ME-$user\b/$(cat "$folder/$user")/" "$folder/users.acl" >"$folder/next"
  mv "$folder/next" "$folder/users.acl"
done
random >"$folder/queue"
random >"$folder/jwt"
printf 'primaryuser replica\nprimaryauth %s\n' "$(cat "$folder/replica")" >"$folder/replication.conf"
# RQ needs wide rights. So it has a server of its own, and the worker another password there.
printf 'user worker on >%s ~* &* +@all -@admin -@dangerous +info +client|list +keys\nuser default off\n' \
  "$(cat "$folder/queue")" >"$folder/queue.acl"

for user in api ship operator; do secret "$user" --from-file="redis-password=$folder/$user"; done
secret worker --from-file="redis-password=$folder/worker" --from-file="queue-password=$folder/queue"
secret redis --from-file="$folder/users.acl" --from-file="$folder/replication.conf"
secret queue --from-file="users.acl=$folder/queue.acl"
secret identity --from-file="jwt-secret=$folder/jwt"
