// A client in TypeScript. Its types come from the server's own description:
//
//     npx openapi-typescript http://127.0.0.1:8000/openapi.json -o api.d.ts
//     npx tsc && node app.mjs http://127.0.0.1:8000 <JWT> photo.jpg
//
// tests/test_api_generated.py does this and runs the program.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { createReadStream, openAsBlob, statSync } from 'node:fs'
import createClient from 'openapi-fetch'
import * as tus from 'tus-js-client'
import type { components, paths } from './api.d.ts'

type Post = components['schemas']['Post']
type Problem = components['schemas']['Problem']

const [url, token, photo] = process.argv.slice(2)
const headers = { Authorization: `Bearer ${token}` }
const api = createClient<paths>({ baseUrl: url, headers })

/** What a call answered, or an exception with the problem's sentence. */
function unwrap<T>(result: { data?: T; error?: Problem; response: Response }): T {
  if (result.error) {
    throw new Error(`${result.error.code}: ${result.error.detail} (${result.response.headers.get('Request-Id')})`)
  }
  return result.data as T
}

/** Publish a photograph by a form. With the same key it may be sent again if the line breaks. */
async function publish(caption: string, key = randomUUID()): Promise<Post> {
  const form = new FormData()
  form.append('image', await openAsBlob(photo), 'photo.jpg')
  form.append('caption', caption)
  return unwrap(await api.POST('/v1/posts', {
    params: { header: { 'Idempotency-Key': key } },
    body: { image: '', caption }, // for the compiler: openapi-typescript takes a file in a form for a string
    bodySerializer: () => form,
  }))
}

/** Wait until the picture is made, in one request if that takes less than 25 s. */
async function ready(post: Post) {
  while (post.status === 'processing') {
    post = unwrap(await api.GET('/v1/posts/{post}', {
      params: { path: { post: post.id }, header: { Prefer: 'wait=25' } },
    }))
  }
  if (post.status === 'failed') throw new Error(post.error.detail)
  return post // its `image` is not null: the compiler knows
}

/** All posts of the feed, page after page. */
async function* feed(limit: number) {
  let cursor: string | null = ''
  while (cursor !== null) {
    const page: components['schemas']['FeedPage'] = unwrap(await api.GET('/v1/posts', {
      params: { query: { limit, cursor } },
    }))
    yield* page.items
    cursor = page.next
  }
}

/** Comment on a post. A repetition with the same key adds nothing. */
function comment(post: string, text: string, key: string) {
  return api.POST('/v1/posts/{post}/comments', {
    params: { path: { post }, header: { 'Idempotency-Key': key } }, body: { text },
  })
}

/** Upload a photograph, or go on where an earlier run of the program stopped. Resolves to the upload's id. */
async function upload(stopAfterOneChunk: boolean, offsets: number[]): Promise<string> {
  // A program that stores the address of its upload does not need the list.
  const open = unwrap(await api.GET('/v1/uploads')).items.find(({ length }) => length === statSync(photo).size)
  return new Promise((resolve, reject) => {
    const sending = new tus.Upload(createReadStream(photo), {
      endpoint: `${url}/v1/uploads`,
      uploadUrl: open && `${url}/v1/uploads/${open.id}`,
      headers,
      chunkSize: 20_000, // so that there is a middle in which it can stop. On a real line leave it out
      onAfterResponse: (request, answer) => {
        if (request.getMethod() === 'HEAD') offsets.push(Number(answer.getHeader('Upload-Offset')))
      },
      onChunkComplete: () => {
        if (stopAfterOneChunk) sending.abort().then(() => resolve(''))
      },
      onSuccess: () => resolve(sending.url!.split('/').pop()!),
      onError: reject,
    })
    sending.start()
  })
}

// Publish by a form, and wait for the picture
const post = await ready(await publish('By a form'))
const picture = await fetch(new URL(post.image.url, url))
assert.equal(picture.headers.get('Content-Type'), 'image/jpeg')

// Upload in pieces, stop, resume, and make a post of it
const offsets: number[] = []
await upload(true, offsets)
const id = await upload(false, offsets)
assert.ok(offsets.length === 1 && offsets[0] >= 20_000, `resumed at ${offsets}`)
const second = await ready(unwrap(await api.POST('/v1/posts', { body: { upload: id, caption: 'In pieces' } })))

// Read the feed page by page
const found = new Set<string>()
for await (const item of feed(1)) found.add(item.id)
assert.ok(found.has(post.id) && found.has(second.id))

// Comment, and repeat the request: it takes effect once
const key = randomUUID()
const first = await comment(post.id, 'Nice!', key)
const again = await comment(post.id, 'Nice!', key)
assert.equal(unwrap(again).id, unwrap(first).id)
assert.equal(again.response.headers.get('Idempotent-Replayed'), 'true')

// Revalidate a copy: 304 has no body, so there are no data and no error
const read = await api.GET('/v1/posts/{post}', { params: { path: { post: post.id } } })
assert.equal(unwrap(read).comment_count, 1)
const known = await api.GET('/v1/posts/{post}', {
  params: { path: { post: post.id }, header: { 'If-None-Match': read.response.headers.get('ETag')! } },
})
assert.equal(known.response.status, 304)

// Delete the comment. The second time it is gone, which the code of the problem says
const path = { post: post.id, comment: unwrap(first).id }
unwrap(await api.DELETE('/v1/posts/{post}/comments/{comment}', { params: { path } }))
const { error } = await api.DELETE('/v1/posts/{post}/comments/{comment}', { params: { path } })
switch (error?.code) {
  case 'nocomment':
    break
  // @ts-expect-error This call never answers `quota`: the compiler knows the codes of each call.
  case 'quota':
    break
  default:
    assert.fail(`unexpected: ${error?.code}`)
}

// A text that is refused: `errors` says which part of the request is wrong
const refused = await comment(post.id, ' ', randomUUID())
assert.equal(refused.error?.code, 'invalid')
assert.equal(refused.error?.errors?.[0].pointer, '#/text')

console.log(JSON.stringify([post.id, second.id]))
