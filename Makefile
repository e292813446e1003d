python := .venv/bin/python

.PHONY: run cluster test quick lint unit test-pillow test-cluster test-compose test-compose-cluster load demo bench bench-before bench-images bench-jpegs bench-turns line capacity drill drill-sealing drill-cluster drill-cluster-restore drill-images drill-lines drill-restarts picture fuzz sbom lock clean

# The file .env is for containers. honcho would read it, but `imagegram-api token` in another terminal would not, and
# would sign with another secret. So deploy/run.py tells honcho not to read it.
run: ## start Redis, API, worker and backup; Ctrl-C ends them
	@.ci/setup run
	@.venv/bin/imagegram-api welcome
	@exec $(python) -m deploy.run

cluster: ## the same on a Redis Cluster of nine nodes on this machine; SHAPE=small: one primary, two replicas, two arbiters
	@.ci/setup run
	@exec $(python) -m deploy.cluster $(or $(SHAPE),cluster)

test: ## linters, then all tests
	@.ci/setup test
	@$(MAKE) --no-print-directory lint unit

# On fakeredis and on the embedded server: the rules of the house, every Lua script, the feed beside a plain model, the
# story of a post, resumed uploads, repeats and refusals. The tests on Debian's redis-server have `[redis` in their names.
quick: ## linters, then what proves most; less than a minute
	@.ci/setup test
	@$(MAKE) --no-print-directory lint
	$(python) -m pytest -n 2 --dist loadfile -k 'not [redis' $(addprefix tests/test_,house.py lua.py api_story.py tus_patch.py \
	  api_repeats.py api_refusals.py storage_model.py)

lint:
	.venv/bin/ruff check --select A001,A002,A006,E,F,I,B,UP,SIM --ignore SIM105 --line-length 120 --target-version py311 .
	luacheck -q --std lua51 --globals redis cjson KEYS ARGV \
	  --read-globals $$(sed -n 's/^local function \([a-z_]*\).*/\1/p' lua/shared.lua) --max-line-length 130 -- lua
	.venv/bin/lint-imports
	.venv/bin/mypy
	.venv/bin/hadolint Dockerfile
	.venv/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml

# Four processes also on two cores: many tests wait for a timer or for a process to start.
unit:
	$(python) -m pytest -n 4 --dist loadfile --no-loadscope-reorder

test-pillow: ## the image tests with Pillow itself, which is used where pillow-simd cannot be compiled
	@.ci/setup test
	$(python) -m venv .venv-pillow
	grep '^pillow==' requirements.lock | \
	  .venv-pillow/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r /dev/stdin
	$(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >$$(echo .venv-pillow/lib/python3*/site-packages)/others.pth
	.venv-pillow/bin/python -c 'from PIL import Image; print("Pillow", Image.__version__)'
	.venv-pillow/bin/python -m pytest -n 2 $(addprefix tests/test_workers_,pipeline.py jpeg.py hostile.py jobs.py)

test-cluster: ## all tests that use a Redis, on a Redis Cluster, of Valkey and of Redis; ten minutes each
	@.ci/setup test
	for kind in valkey redis; do CLUSTER=$$kind $(python) -m pytest -n 2 --dist loadfile || exit 1; done
	$(python) -m pytest -s tests/drills/cluster_run.py tests/drills/growing.py

test-compose: ## the containers in a real engine: the README's commands, kills, a restore; four minutes, needs root
	@.ci/setup test
	@$(python) -m tests.compose single

test-compose-cluster: ## the same with the profile `cluster`: six nodes of Redis; five minutes, needs root
	@.ci/setup test
	@$(python) -m tests.compose cluster

load: ## the load of 50 users (locust) on a site that runs, with the forecast's mix of calls; one minute
	@.ci/setup test
	.venv/bin/locust -f tests/load/locustfile.py --headless --users 50 --spawn-rate 10 --run-time 60s \
	  --host http://$${IMAGEGRAM_HOST:-127.0.0.1}:$${IMAGEGRAM_PORT:-8000} --html tests/load/report.html

demo: ## fill a site that runs with drawn pictures and comments; two minutes at most, and a second run adds nothing
	@.ci/setup run
	@$(python) -m tests.load.demo

dashboard: ## draw the dashboard of deploy/observe/ while people use a new site: docs/images/dashboard.png; a minute and a half
	@.ci/setup test
	PYTHONPATH=tests $(python) -m tests.load.dashboard

bench: ## all figures of docs/performance.md, beside bare Sanic and a peer; forty minutes
	@.ci/setup bench
	$(python) -m tests.bench

bench-before: ## compare the rates of this checkout with those of a revision: make bench-before REVISION=main~10; LIMITS=read=9000000/s,… sets rate limits
	@.ci/setup bench
	$(python) -m tests.bench.before $(REVISION) --limits '$(LIMITS)'

bench-images: ## the cost of a picture, beside libvips
	@.ci/setup bench
	$(python) -m tests.bench.images

bench-jpegs: ## bytes, quality and cost of JPEGs, now and with Pillow, of 37 photographs; two minutes
	@.ci/setup bench
	$(python) -m tests.bench.jpegs

bench-turns: ## how long a photograph waits behind another user's large images; two minutes
	@.ci/setup bench
	$(python) -m tests.bench.turns

line: ## what people see on slow lines, and how long they upload: HTTP/1.1, 2 and 3, cubic and bbr; needs root; fifteen minutes
	@.ci/setup bench
	PYTHONPATH=tests $(python) -c 'from tests.bench.jpegs import photographs; photographs()'
	unshare --net $(python) -m tests.line

capacity: ## compute docs/capacity.md, its tables and its picture, from measured figures
	@.ci/setup test
	$(python) -m tests.bench.capacity

drill: ## the long durability tests, with figures; ten minutes at most; the drill of a full disk needs root
	@.ci/setup test
	PYTHONPATH=tests timeout 600 $(python) -m tests.drills.drill

drill-sealing: ## the long form of the model test and its mutants, kills and many clients while old comments move; ten minutes
	@.ci/setup test
	$(python) -m pytest -s tests/drills/long_model.py
	LONG=1 $(python) -m pytest -s $(addprefix tests/test_,storage_mutants.py storage_sealing_kills.py api_sealing_concurrency.py)

drill-cluster: ## a Redis Cluster whose nodes are killed, cut off and paused, and whose slots move; ten minutes at most
	@.ci/setup test
	PYTHONPATH=tests timeout 600 $(python) -m tests.drills.cluster

drill-cluster-restore: ## restore a Cluster to 20 random seconds across failovers and moved slots; ten minutes at most
	@.ci/setup test
	PYTHONPATH=tests timeout 600 $(python) -m tests.drills.cluster_restore

drill-images: ## the long tests of workers: a backlog, kills, Redis away, damaged images; twelve minutes at most
	@.ci/setup test
	PYTHONPATH=tests timeout 720 $(python) -m tests.drills.images

drill-lines: ## the long tests of bad connections: a crowd, a trickle, 50 kills; four minutes
	@.ci/setup test
	$(python) -m pytest -s tests/drills/connections.py
	KILLS=50 $(python) -m pytest tests/test_uploads_races.py -k kill

drill-restarts: ## rolling restarts of two nodes behind HAProxy while people comment and upload; a minute
	@.ci/setup test
	$(python) -m pytest -s tests/drills/restarts.py

picture: ## draw the picture of the page /docs in docs/images/ again
	@.ci/setup test
	PICTURE=docs/images/docs-page.png $(python) -m pytest tests/test_api_page.py -k picture

fuzz: ## 10,000 random requests over all routes, and 10,000 made from the description; ten minutes
	@.ci/setup test
	PYTHONPATH=tests timeout 600 $(python) -m tests.drills.fuzz
	PYTHONPATH=tests timeout 1200 $(python) -m tests.drills.described

sbom: ## write sbom.json, a bill of materials of the servers (CycloneDX), with licences and hashes
	@.ci/setup test
	$(python) -m deploy.sbom >sbom.json

lock: ## write requirements.lock again, with the newest versions
	@.ci/lock

clean:
	rm -rf .venv .venv-lock .venv-pillow .cache data
