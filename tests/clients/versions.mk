# Other people's programs as `make test-clients` runs them. docs/clients.md tells the same versions.

NPM_CLIENTS := @anthropic-ai/claude-code@2.1.197 @openai/codex@0.169.0 opencode-ai@1.18.33 \
	@continuedev/cli@1.5.47 cline@3.0.65
AIDER := aider-chat==0.86.2
LLAMA_VIM_URL := https://github.com/ggml-org/llama.vim
LLAMA_VIM_COMMIT := a1c8e6e40cb45df59b78add5b65d575386832465
