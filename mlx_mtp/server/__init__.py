"""The HTTP server: JSON to requests, stream chunks to JSON. One thread owns the engine; nothing here holds arrays.

asking      GenerationRequest: what a client asks for, in one form for all dialects
nouns       Settings, StreamChunk, FinishInfo, Usage, ServerError
service     Admission: prompts to token ids, limits, sampling defaults, the queue
worker      EngineThread: submit, cancel, faults; GenerationStream: the chunks of one HTTP request
decoding    OutputDecoder: tokens to reasoning, answer and tool calls; where an output ends
respond     request bodies in, event streams and JSON bodies out, disconnects
openai      a dialect; another dialect is one more file like it and a line in `app`
gate        hosts, origins, keys and the log line, in front of every route
app         routes, health, metrics
run         the process: socket, signals, exit code
"""
