"""Image work: leases posts that are due, creates the JPEG that is served, and erases bytes that may no longer be read.

| module | what it does |
|---|---|
| `__main__` | the command `imagegram-worker`: starts the dispatcher and the RQ workers (converters) |
| `dispatcher` | takes due work from the outbox; gives image work to RQ's queue, ends uploads and erases bytes itself |
| `jobs` | RQ's job: one attempt at one post's image |
| `remaking` | the command `imagegram-worker remake`: makes the JPEGs of older versions again |
| `sandbox` | runs the pipeline in a process that can do nothing but decode |
| `pipeline` | the steps from a file to the picture |
| `jpeg`, `png`, `bmp`, `rle` | readers of the file formats |
| `colour`, `thumbhash` | ICC profiles; the blurred preview |
| `errors` | why no picture can be created of an image |

`api` and `storage` import neither PIL, simplejpeg nor RQ. This package never imports the API.
"""

import storage  # noqa: F401  before RQ imports redis-py: see there
