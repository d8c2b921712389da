// Context switches between the scheduler and the fibers, one fiber a GPU thread.
// x86-64 has its own switch (a system call per switch, as swapcontext makes, would dominate); others use ucontext, tried on x86-64 only.
#pragma once
#include "state.h"

#if defined(__x86_64__)
extern "C" void msl_switch(void** save, void* to);
asm(".text\n.globl msl_switch\n.type msl_switch,@function\nmsl_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
#endif

namespace {

#if defined(__x86_64__)

inline void to_scheduler() { msl_switch(&current->sp, scheduler_sp); }

inline void resume(Fiber& fiber) {
  current = &fiber;
  msl_switch(&scheduler_sp, fiber.sp);
  current = nullptr;
}

#else

ucontext_t scheduler_context;

inline void to_scheduler() { swapcontext(&current->context, &scheduler_context); }

inline void resume(Fiber& fiber) {
  current = &fiber;
  swapcontext(&scheduler_context, &fiber.context);
  current = nullptr;
}

#endif

[[noreturn]] void fiber_main() {
  void* arguments[MAX_ARGUMENTS]; // on the fiber's stack, which the memory hooks ignore
  memcpy(arguments, kernel_arguments, sizeof arguments);
  ThreadInfo info = current->info;
  launch->entry(arguments, &info);
  current->state = DONE;
  to_scheduler();
  abort();
}

void prepare(Fiber& fiber) {
  fiber.state = READY;
#if defined(__x86_64__)
  void** sp = (void**)(fiber.stack + stack_size);
  *--sp = nullptr; // keeps the alignment the ABI wants at function entry
  *--sp = (void*)fiber_main;
  for (int saved = 0; saved < 6; saved++) *--sp = nullptr;
  fiber.sp = sp;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = stack_size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, (void (*)())fiber_main, 0);
#endif
}

// Ends the launch from inside a fiber, which is never resumed.
void die() {
  fatal = true;
  if (!current) return;
  current->state = DEAD;
  to_scheduler();
}

} // namespace
