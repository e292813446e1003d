// Uploads a file with tus-js-client, as an app on a bad line does it. Prints the address of the upload.
// node upload.js FILE ENDPOINT TOKEN [CHUNK SIZE, or 0 for whole] [PARTS that are sent at the same time]
const fs = require('fs')
const tus = require('tus-js-client')

const [file, endpoint, token, chunkSize, parts] = process.argv.slice(2)
const STALL = 1500 // ms without progress after which an app gives up a request; the library itself waits forever
let heard = Date.now()
let starts = 5

const upload = new tus.Upload(fs.createReadStream(file), {
  endpoint,
  chunkSize: Number(chunkSize) || Infinity,
  ...(parts ? { parallelUploads: Number(parts) } : { uploadSize: fs.statSync(file).size }), // it refuses both together
  headers: { Authorization: `Bearer ${token}` },
  metadata: { filename: 'photo.png' },
  retryDelays: [0, 50, 100, 200, 400, 800],
  onProgress: () => { heard = Date.now() },
  onError: (error) => {
    // The library repeats each request, but not the last one, which makes one upload of the parts.
    if (parts && !error.originalRequest && starts--) return setTimeout(() => upload.start(), 50)
    console.error(String(error))
    process.exit(1)
  },
  onSuccess: () => { clearInterval(watch); console.log(upload.url) },
})
const watch = setInterval(async () => {
  if (Date.now() - heard > STALL) {
    heard = Date.now()
    await upload.abort()
    // Waits first. Otherwise the error of the aborted request would start a second request at the same time.
    setTimeout(() => upload.start(), 200)
  }
}, 100)
upload.start()
