"""The HTTP server: JSON to jobs, deltas to JSON. One thread of its own (worker) holds the engine; knows no arrays.

nouns       Settings, Job, Delta, Finish, ServerError: what passes between a dialect and the worker
decoding    one choice's tokens to reasoning and answer; stop strings
worker      the engine thread: submit, cancel, faults; Generation, a request's deltas as they come
service     what every dialect needs: prompts to token ids, limits, sampling defaults, admission
respond     a generation as an event stream or one body; disconnects; reading bodies
openai      the OpenAI dialect; another dialect is one more file beside it and a line in `app`
gate        hosts, origins, keys, the log line; in front of every route
app         routes, health, metrics; run: the process: socket, signals, exit code
"""
