// The emulator's runtime: runs one launch of a compiled kernel, one fiber a GPU thread.
//
// Kernels are compiled with -fsanitize=thread but not linked with libtsan: the __tsan_* hooks are ours (hooks.h).
// They see every load and store of the unmodified source, with no pointer classes and no source changes.
#include "schedule.h"

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t GAP = size_t(8) << 30; // address space only: a 32-bit index cannot reach the neighbour

struct Mapping {
  uint8_t* base;
  size_t size;
};

Mapping arena, stacks;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

uint8_t* reserve(size_t size, int protection) {
  void* p = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (uint8_t*)p;
}

int collect_module(dl_phdr_info* module, size_t, void* wanted) {
  bool found = false;
  for (int k = 0; k < module->dlpi_phnum; k++) {
    auto& h = module->dlpi_phdr[k];
    const uintptr_t low = module->dlpi_addr + h.p_vaddr;
    found |= h.p_type == PT_LOAD && (uintptr_t)wanted >= low && (uintptr_t)wanted < low + h.p_memsz;
  }
  if (!found) return 0;
  for (int k = 0; k < module->dlpi_phnum; k++) {
    auto& h = module->dlpi_phdr[k];
    const uintptr_t low = module->dlpi_addr + h.p_vaddr;
    if (h.p_type == PT_LOAD) module_ranges.push_back({low, low + h.p_memsz});
  }
  return 1;
}

void reset(Launch* l) {
  launch = l;
  fatal = false;
  report_count = report_length = 0;
  reported.clear();
  tg_variables.clear();
  tg_used = 0;
  last_buffer = nullptr;
  current = nullptr;
  pending.active = false;
  module_ranges.clear();
  dl_iterate_phdr(collect_module, l->module_address);
  deadline_s = now_s() + l->timeout_s;
  random_state = l->seed * 2654435761u + 12345u;
  tg_serial = tg_epoch = device_epoch = 0;
  if (!tg_memory) {
    tg_memory = reserve(THREADGROUP_CAPACITY, PROT_READ | PROT_WRITE);
    tg_cells = (Cell*)reserve(THREADGROUP_CAPACITY * sizeof(Cell), PROT_READ | PROT_WRITE);
  }
  memset(tg_cells, 0, 65536 * sizeof(Cell));
}

Cell* make_cells(const BufferDescription& d) {
  const size_t count = d.size / d.granule + 1;
  Cell* cells = (Cell*)reserve(count * sizeof(Cell), PROT_READ | PROT_WRITE);
  if (d.flags & INITIALISED)
    for (size_t k = 0; k < count; k++) cells[k].written = 1;
  return cells;
}

// Each buffer ends where its pages end (to 16 bytes), with inaccessible gaps around it.
bool map_buffers() {
  size_t total = GAP;
  for (uint32_t i = 0; i < launch->buffer_count; i++) total += round_up(launch->buffers[i].size + 1, PAGE) + PAGE + GAP;
  arena = {reserve(total, PROT_NONE), total};
  if (!arena.base) return false;
  buffers.clear();
  uint8_t* p = arena.base + GAP;
  for (uint32_t i = 0; i < launch->buffer_count; i++) {
    auto& d = launch->buffers[i];
    const size_t span = d.size ? round_up(d.size, PAGE) : PAGE;
    mprotect(p, span, PROT_READ | PROT_WRITE);
    uint8_t* base = p + span - round_up(d.size, 16);
    if (d.flags & INITIALISED)
      memcpy(base, d.host, d.size);
    else
      memset(base, 0xFF, d.size);
    const bool writable = d.flags & WRITABLE;
    if (!writable) mprotect(p, span, PROT_READ);
    buffers.push_back(
        {base, base + d.size, d.name, d.granule, writable, launch->check && writable ? make_cells(d) : nullptr, 0, 0, 0});
    kernel_arguments[i] = base;
    p += span + GAP;
  }
  return true;
}

void map_stacks(uint32_t count) {
  stack_size = size_t(launch->stack_kb) << 10;
  const size_t each = stack_size + PAGE; // a guard page below
  stacks = {reserve(count * each, PROT_READ | PROT_WRITE), count * each};
  stacks_low = stacks.base;
  stacks_high = stacks.base + stacks.size;
  fibers.assign(count, Fiber{});
  for (uint32_t i = 0; i < count; i++) {
    mprotect(stacks.base + i * each, PAGE, PROT_NONE);
    fibers[i].stack = stacks.base + i * each + PAGE;
  }
}

// The attributes of one thread of threadgroup `group`, which has `size` threads (fewer at the edges of the grid).
void describe_thread(uint32_t t, const uint32_t* group, const uint32_t* size, const uint32_t* full,
                     const uint32_t* groups) {
  Fiber& f = fibers[t];
  f.linear = t;
  f.simdgroup = t / 32;
  f.lane = t % 32;
  ThreadInfo& info = f.info;
  memset(&info, 0, sizeof info);
  const uint32_t full_count = full[0] * full[1] * full[2];
  const uint32_t position[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
  info.dispatch_quadgroups_per_threadgroup = (full_count + 3) / 4;
  info.dispatch_simdgroups_per_threadgroup = (full_count + 31) / 32;
  info.quadgroup_index_in_threadgroup = t / 4;
  info.quadgroups_per_threadgroup = (threads + 3) / 4;
  info.simdgroup_index_in_threadgroup = f.simdgroup;
  info.simdgroups_per_threadgroup = simdgroups;
  info.thread_execution_width = info.threads_per_simdgroup = 32;
  info.thread_index_in_quadgroup = t % 4;
  info.thread_index_in_simdgroup = f.lane;
  info.thread_index_in_threadgroup = t;
  for (int i = 0; i < 3; i++) {
    info.dispatch_threads_per_threadgroup[i] = full[i];
    info.grid_size[i] = info.threads_per_grid[i] = launch->grid[i];
    info.thread_position_in_threadgroup[i] = position[i];
    info.thread_position_in_grid[i] = group[i] * full[i] + position[i];
    info.threadgroup_position_in_grid[i] = group[i];
    info.threadgroups_per_grid[i] = groups[i];
    info.threads_per_threadgroup[i] = size[i];
  }
}

void run_grid(const uint32_t* full, const uint32_t* groups) {
  const size_t count = size_t(groups[0]) * groups[1] * groups[2];
  for (size_t k = 0; k < count && !fatal; k++) {
    const size_t g = launch->order == 1 ? count - 1 - k : k;
    const uint32_t group[3] = {uint32_t(g % groups[0]), uint32_t(g / groups[0] % groups[1]),
                               uint32_t(g / groups[0] / groups[1])};
    uint32_t size[3];
    for (int i = 0; i < 3; i++) {
      const uint32_t left = launch->grid[i] - group[i] * full[i];
      size[i] = left < full[i] ? left : full[i];
    }
    threads = size[0] * size[1] * size[2];
    simdgroups = (threads + 31) / 32;
    for (uint32_t t = 0; t < threads; t++) describe_thread(t, group, size, full, groups);
    run_threadgroup();
  }
}

void on_segv(int, siginfo_t* info, void*) {
  pending.address = (uint8_t*)info->si_addr;
  siglongjmp(segv_jump, 1);
}

void report_segv() {
  uint8_t* a = pending.address;
  if (a >= stacks_low && a < stacks_high) {
    report(SEGFAULT, nullptr, 0, "kernel stack overflow");
  } else {
    const char* name = "?";
    long long index = 0;
    for (auto& b : buffers) {
      if (a <= b.base - GAP / 2 || a >= b.end + GAP / 2) continue;
      name = b.name;
      index = (long long)(a - b.base) / (long long)b.granule;
    }
    report(SEGFAULT, nullptr, 0, "bad address; nearest buffer %s[%lld]", name, index);
  }
  current = nullptr;
  fatal = true;
}

// Runs the grid with bad addresses caught on a stack of their own.
void run_guarded(const uint32_t* full, const uint32_t* groups) {
  static std::vector<uint8_t> signal_stack(1 << 16);
  struct sigaction action{}, old_segv, old_bus;
  stack_t stack{}, old_stack;
  stack.ss_sp = signal_stack.data();
  stack.ss_size = signal_stack.size();
  sigaltstack(&stack, &old_stack);
  action.sa_sigaction = on_segv;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (sigsetjmp(segv_jump, 1) == 0)
    run_grid(full, groups);
  else
    report_segv();
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  stack.ss_flags = SS_DISABLE;
  sigaltstack(old_stack.ss_flags & SS_DISABLE ? &stack : &old_stack, nullptr);
}

void return_results() {
  for (uint32_t i = 0; i < launch->buffer_count; i++) {
    auto& d = launch->buffers[i];
    auto& b = buffers[i];
    d.read_bytes = b.read_bytes;
    d.fetched_bytes = b.fetched_bytes;
    d.written_bytes = b.written_bytes;
    d.unwritten = d.first_unwritten = 0;
    if (d.flags & RETURNED) memcpy(d.host, b.base, d.size);
    if (!b.cells) continue;
    const size_t count = d.size / d.granule;
    for (size_t k = 0; k < count && !fatal; k++)
      if (!b.cells[k].written && !d.unwritten++) d.first_unwritten = k;
    munmap(b.cells, (count + 1) * sizeof(Cell));
  }
  launch->threadgroup_bytes = tg_used;
  if (report_length < launch->report_capacity) launch->report[report_length] = 0;
}

} // namespace

// Returns the number of reports, or -1 if the buffers cannot be mapped.
extern "C" int msl_launch(Launch* l) {
  reset(l);
  if (!map_buffers()) return -1;
  uint32_t full[3], groups[3];
  for (int i = 0; i < 3; i++) { // dispatchThreads: the last threadgroups may be smaller
    full[i] = l->threadgroup[i] < l->grid[i] ? l->threadgroup[i] : l->grid[i];
    groups[i] = (l->grid[i] + full[i] - 1) / full[i];
  }
  map_stacks(full[0] * full[1] * full[2]);
  run_guarded(full, groups);
  return_results();
  munmap(arena.base, arena.size);
  munmap(stacks.base, stacks.size);
  return (int)report_count;
}
