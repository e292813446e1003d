"""The backup: ships Redis' append-only file to object storage, restores it, and removes old backups.

    Redis ─► appendonlydir ─► ship ─► backup store ─► restore ─► a new data folder
                                         ▲     │
                                    retain     └─► verify: a trial restore

    aof.py        reads the files that Redis writes          restore.py    from the store into a data folder
    watch.py      keeps these files open                     shards.py     restores a Cluster, a folder for each shard
    ship.py       copies them into the store                 verify.py     restores as a trial, stores the result
    chain.py      the objects in the store                   retain.py     chooses what is kept, removes the rest
    owners.py     which node of a Cluster had which slots    snapshots.py  lists what the store holds
    state.py      how far the shipper is, for `/readyz`

**What Redis writes** (Redis documentation, "Redis persistence"):

| word | meaning |
|---|---|
| base | all data at one moment, as an RDB file |
| increment | the commands since then, one after the other; only the newest increment grows |
| manifest | names one base and the increments after it, in order |
| rewrite | Redis writes a new base, begins a new increment, and deletes the old files; BGREWRITEAOF requests one |

**What the store holds:**

| word | object | content |
|---|---|---|
| segment | `00000007/appendonly.aof.7.base.rdb/000000004194304` | up to 4 MiB of a file, from that byte on |
| end mark | the same, its number is the length of the file | no bytes; the file ended here, and which file is next |
| close mark | the same | no bytes; the chain ended here, and which generation is next |
| chain | all objects below `00000007/` | a base and its increments; each object names the digest of the one before |
| description | `generations/00000007` | name, length and digest of the base, and which server wrote it |
| generation | `00000007/` and `generations/00000007` | a chain and its description |
| result of the last trial | `verified` | whether the newest generation could be restored |

The store of a Redis Cluster holds all of this for each node, replicas included, below the id of the node, and besides:

| word | object | content |
|---|---|---|
| record | `owners/<node id>/001795791848256` | the node's role and slots, and since when |
| result of the last trial | `verified` | whether the newest data of all shards could be restored |

    generation 7   ┌────────── base ───────────┐   ┌──────── increment ────────┐
                   segment ◄─ segment ◄─ end mark ◄─ segment ◄─ … ◄─ close mark ─ ─► generation 8
                                            ▲
    generations/00000007 ───────────────────┘  created once base and increments are shipped up to now

**States of a generation**, as `imagegram-storage snapshots` shows them. Before the description exists the generation
has no state: `restore` does not find it.

| state | last object of the chain | which seconds can be restored |
|---|---|---|
| `open` | any, and no generation is newer | from the base up to the last segment; it still grows |
| `closed` | a close mark | from the base up to the base of the next generation |
| `gap` | a close mark with `gap`, a segment, or none | from the base up to the last segment; later ones are lost |
| `base` | the end mark of the base | only the second of the base: `retain` removed the increments |
"""
