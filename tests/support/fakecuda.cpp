// A CUDA device that is not there: the part of libcudart, libcublas(Lt) and libcuda that torch 2.10+cu128 and triton 3.6 ask for.
// Memory is host memory (lazy zero pages, with a limit), kernels and products do nothing and are counted, stream capture obeys CUDA's rules.
// The rules of capture are a model of CUDA's; arithmetic, timing, cuDNN (to be switched off) and cuBLAS's own split-K are not there.
// tests/support/fakecuda.py builds it as libcuda.so.1 and loads it first. FAKECUDA_CC, _SMS, _MEM_GB, _DEVICES: the device; _LOG: a file for what it refuses.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cublas_v2.h>
#include <cublasLt.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <cxxabi.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>
#define API extern "C" __attribute__((visibility("default")))
static std::recursive_mutex mu;
#define LOCK std::lock_guard<std::recursive_mutex> lock_(mu)
static int env_int(const char* n, int d) {
  const char* v = getenv(n);
  return v ? atoi(v) : d;
}
static int CC() {
  static int v = env_int("FAKECUDA_CC", 90);
  return v;
}
static int SMS() {
  static int v = env_int("FAKECUDA_SMS", 132);
  return v;
}
static size_t MEM() {
  static size_t v = (size_t)(atof(getenv("FAKECUDA_MEM_GB") ? getenv("FAKECUDA_MEM_GB") : "141") * 1e9);
  return v;
}
static int SMEM() {
  int c = CC();
  return (c == 80 || c == 87) ? 163 * 1024 : (c == 90 || c == 100 || c == 110) ? 227 * 1024 : c == 75 ? 64 * 1024 : 99 * 1024;
}
static FILE* logf_() {
  static FILE* f = nullptr;
  if (!f) {
    const char* p = getenv("FAKECUDA_LOG");
    f = p ? fopen(p, "a") : stderr;
    setvbuf(f, nullptr, _IOLBF, 0);
  }
  return f;
}
#define SAY(...)                                                                                                                                     \
  do {                                                                                                                                               \
    fprintf(logf_(), __VA_ARGS__);                                                                                                                   \
    fputc('\n', logf_());                                                                                                                            \
  } while (0)
struct Graph {
  std::vector<std::string> nodes;
  unsigned long long id;
};
struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  Graph* graph;
  bool invalid = false;
};
static std::map<cudaStream_t, Capture*> capturing;    // streams -> their capture
static std::map<cudaEvent_t, Capture*> event_capture; // events recorded in a capture
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static thread_local cudaError_t last = cudaSuccess;
static unsigned long long captures = 0, serial = 0x1000;
static std::map<std::string, long> counted; // everything launched since the last fake_reset
static long violations = 0, syncs = 0, pageable = 0, mallocs = 0, hostallocs = 0;
static cudaError_t fail(cudaError_t e) {
  last = e;
  return e;
}
static bool unsafe(const char* what) {
  LOCK;
  if (capturing.empty() || thread_mode == cudaStreamCaptureModeRelaxed) return false;
  auto me = std::this_thread::get_id();
  for (auto& c : capturing) {
    bool mine = c.second->thread == me;
    if (c.second->mode == cudaStreamCaptureModeRelaxed) continue;
    if ((mine) || (c.second->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal)) {
      violations++;
      c.second->invalid = true;
      SAY("VIOLATION: %s while a stream is captured (%s)", what, mine ? "by this thread" : "by another thread, mode global");
      return true;
    }
  }
  return false;
}
static Capture* of(cudaStream_t s) {
  auto f = capturing.find(s);
  return f == capturing.end() ? nullptr : f->second;
}
static void submit(cudaStream_t s, const std::string& what) {
  LOCK;
  if (auto c = of(s)) {
    c->graph->nodes.push_back(what);
    counted["captured " + what]++;
  } else {
    counted[what]++;
    for (auto& each : capturing)
      if (each.second->thread == std::this_thread::get_id()) {
        SAY("WARNING: '%s' goes to stream %p outside the capture that this thread records", what.c_str(), (void*)s);
      }
  }
}
// ---- memory
static std::map<char*, std::pair<size_t, int>> blocks;
static size_t used = 0, peak = 0; // 1 device, 2 pinned
static const std::pair<size_t, int>* block(const void* p) {
  auto f = blocks.upper_bound((char*)p);
  if (f == blocks.begin()) return nullptr;
  --f;
  return (char*)p < f->first + f->second.first ? &f->second : nullptr;
}
API cudaError_t cudaMalloc(void** p, size_t n) {
  LOCK;
  mallocs++;
  if (unsafe("cudaMalloc")) return fail(cudaErrorStreamCaptureUnsupported);
  size_t r = (n + (2u << 20) - 1) / (2u << 20) * (2u << 20);
  if (used + r > MEM()) {
    *p = nullptr;
    return fail(cudaErrorMemoryAllocation);
  }
  void* a = mmap(nullptr, r + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (a == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  blocks[(char*)a] = {r, 1};
  used += r;
  if (used > peak) peak = used;
  *p = a;
  return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
API cudaError_t cudaFree(void* p) {
  LOCK;
  if (!p) return cudaSuccess;
  if (unsafe("cudaFree")) return fail(cudaErrorStreamCaptureUnsupported);
  auto f = blocks.find((char*)p);
  if (f == blocks.end()) return fail(cudaErrorInvalidValue);
  used -= f->second.first;
  munmap(p, f->second.first + 4096);
  blocks.erase(f);
  return cudaSuccess;
}
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  LOCK;
  hostallocs++;
  if (unsafe("cudaHostAlloc")) return fail(cudaErrorStreamCaptureUnsupported);
  if (posix_memalign(p, 4096, n ? n : 1)) return fail(cudaErrorMemoryAllocation);
  memset(*p, 0, n);
  blocks[(char*)*p] = {n ? n : 1, 2};
  return cudaSuccess;
}
API cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
API cudaError_t cudaFreeHost(void* p) {
  LOCK;
  if (unsafe("cudaFreeHost")) return fail(cudaErrorStreamCaptureUnsupported);
  blocks.erase((char*)p);
  free(p);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  LOCK;
  *t = MEM();
  *f = MEM() - used;
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  LOCK;
  memset(a, 0, sizeof *a);
  auto b = block(p);
  a->device = 0;
  a->type = !b ? cudaMemoryTypeUnregistered : b->second == 1 ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  a->devicePointer = b ? (void*)p : nullptr;
  a->hostPointer = b && b->second == 2 ? (void*)p : nullptr;
  return cudaSuccess;
}
static const char* kind(const void* p) {
  auto b = block(p);
  return !b ? "pageable" : b->second == 1 ? "device" : "pinned";
}
static cudaError_t copy(void* d, const void* s, size_t n, cudaStream_t st, bool async) {
  LOCK;
  std::string kd = kind(d), ks = kind(s), what = (async ? "memcpyAsync " : "memcpy ") + ks + "->" + kd;
  if (!async) {
    syncs++;
    if (unsafe("cudaMemcpy")) return fail(cudaErrorStreamCaptureUnsupported);
  }
  if (kd == "pageable" || ks == "pageable") {
    pageable++;
    if (auto c = of(st)) {
      violations++;
      c->invalid = true;
      SAY("VIOLATION: copy of pageable memory in a capture (%s, %zu bytes)", what.c_str(), n);
    }
  }
  submit(st, what);
  // what kernels would have written is not there: answers are zeros, a single byte is 1 (true), and copies on the device are left out
  if (!of(st)) {
    if (ks == "device" && kd != "device") memset(d, n == 1, n);
    else if (ks != "device") memcpy(d, s, n);
  }
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t st) { return copy(d, s, n, st, true); }
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { return copy(d, s, n, 0, false); }
API cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t st) { return copy(d, s, n, st, true); }
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
API cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) {
  submit(s, "memset");
  LOCK;
  if (!of(s) && v) memset(p, v, n);
  else if (!of(s) && n < (1u << 22)) memset(p, 0, n);
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* p, int v, size_t n) { return cudaMemsetAsync(p, v, n, 0); }
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  static char dummy[1 << 16];
  *p = dummy;
  return cudaSuccess;
}
// ---- device
API cudaError_t cudaGetDeviceCount(int* n) { return *n = env_int("FAKECUDA_DEVICES", 1), cudaSuccess; }
static thread_local int device_ = 0;
API cudaError_t cudaGetDevice(int* d) { return *d = device_, cudaSuccess; }
API cudaError_t cudaSetDevice(int d) { return device_ = d, cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* v) { return *v = 12080, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 12080, cudaSuccess; }
#undef cudaGetDeviceProperties
API cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, 256, "Fake sm_%d", CC());
  p->totalGlobalMem = MEM();
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  for (int i = 0; i < 3; i++) {
    p->maxThreadsDim[i] = i == 2 ? 64 : 1024;
    p->maxGridSize[i] = i ? 65535 : 2147483647;
  }
  p->major = CC() / 10;
  p->minor = CC() % 10;
  p->multiProcessorCount = SMS();
  p->l2CacheSize = 50 << 20;
  p->maxThreadsPerMultiProcessor = (CC() == 86 || CC() == 89 || CC() == 120 || CC() == 87) ? 1536 : 2048;
  p->sharedMemPerBlockOptin = SMEM();
  p->sharedMemPerMultiprocessor = SMEM() + 1024;
  p->regsPerMultiprocessor = 65536;
  p->clockRate = 1980000;
  p->memoryClockRate = 3000000;
  p->memoryBusWidth = 5120;
  p->textureAlignment = 512;
  p->concurrentKernels = 1;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = 1;
  p->cooperativeLaunch = 1;
  p->maxBlocksPerMultiProcessor = 32;
  p->streamPrioritiesSupported = 1;
  p->pciBusID = 1;
  return cudaSuccess;
}
static int attribute(int a) {
  switch (a) {
  case 1: return 1024;
  case 2:
  case 3: return 1024;
  case 4: return 64;
  case 5: return 2147483647;
  case 6:
  case 7: return 65535;
  case 8: return 49152;
  case 10: return 32;
  case 12: return 65536;
  case 13: return 1980000;
  case 14: return 512;
  case 16: return SMS();
  case 36: return 3000000;
  case 37: return 5120;
  case 38: return 50 << 20;
  case 39: return CC() == 90 ? 2048 : 1536;
  case 75: return CC() / 10;
  case 76: return CC() % 10;
  case 81: return SMEM() + 1024;
  case 82: return 65536;
  case 95: return 1;
  case 97: return SMEM();
  case 111: return 1024;
  case 115: return 1;
  case 120: return 1;
  default: return 0;
  }
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) { return *v = attribute((int)a), cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() {
  LOCK;
  syncs++;
  counted["cudaDeviceSynchronize"]++;
  if (!capturing.empty()) {
    for (auto& c : capturing) c.second->invalid = true;
    violations++;
    SAY("VIOLATION: cudaDeviceSynchronize while a stream is captured");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) { return *v = 0, cudaSuccess; }
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) { return *p = (cudaMemPool_t)0x77, cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int) { return snprintf(s, n, "0000:01:00.0"), cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
  *a = 0;
  *b = -5;
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() {
  auto e = last;
  last = cudaSuccess;
  return e;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorStreamCaptureUnsupported   ? "operation not permitted when stream is capturing"
         : e == cudaErrorMemoryAllocation         ? "out of memory"
         : e == cudaErrorStreamCaptureInvalidated ? "operation failed due to a previous error during capture"
                                                  : "fake error";
}
API const char* cudaGetErrorName(cudaError_t) { return "cudaErrorFake"; }
// ---- streams, events
API cudaError_t cudaStreamCreate(cudaStream_t* s) {
  LOCK;
  return *s = (cudaStream_t)(serial += 16), cudaSuccess;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { return *p = 0, cudaSuccess; }
static cudaError_t ask(cudaStream_t s, const char* what, bool counts) {
  LOCK;
  if (counts) {
    syncs++;
    counted[what]++;
  }
  if (auto c = of(s)) {
    violations++;
    c->invalid = true;
    SAY("VIOLATION: %s of a captured stream", what);
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t s) { return ask(s, "cudaStreamSynchronize", true); }
API cudaError_t cudaStreamQuery(cudaStream_t s) { return ask(s, "cudaStreamQuery", false); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  LOCK;
  auto f = event_capture.find(e);
  if (f != event_capture.end() && !of(s)) capturing[s] = f->second;
  else if (of(s) && f == event_capture.end()) {
    SAY("WARNING: a captured stream waits for an event recorded outside the capture");
    violations++;
    of(s)->invalid = true;
    return fail(cudaErrorStreamCaptureIsolation);
  }
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* d, unsigned) { return f(s, cudaSuccess, d), cudaSuccess; }
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* d) { return f(d), cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  LOCK;
  return *e = (cudaEvent_t)(serial += 16), cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) {
  LOCK;
  return event_capture.erase(e), cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
  LOCK;
  if (auto c = of(s)) event_capture[e] = c;
  else event_capture.erase(e);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
API cudaError_t cudaEventQuery(cudaEvent_t e) {
  LOCK;
  if (unsafe("cudaEventQuery")) return fail(cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  LOCK;
  syncs++;
  counted["cudaEventSynchronize"]++;
  if (event_capture.count(e)) {
    violations++;
    SAY("VIOLATION: cudaEventSynchronize of a captured event");
    return fail(cudaErrorCapturedEvent);
  }
  return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 0.05f, cudaSuccess; }
// ---- capture
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  auto old = thread_mode;
  thread_mode = *m;
  *m = old;
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode m) {
  LOCK;
  if (of(s)) return fail(cudaErrorIllegalState);
  if (!s) {
    violations++;
    SAY("VIOLATION: capture of the legacy stream");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  auto g = new Graph;
  auto c = new Capture{++captures, m, std::this_thread::get_id(), g};
  g->id = c->id;
  capturing[s] = c;
  SAY("capture %llu begins, mode %d", c->id, (int)m);
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
  LOCK;
  auto c = of(s);
  if (!c) return fail(cudaErrorIllegalState);
  for (auto i = capturing.begin(); i != capturing.end();) i = i->second == c ? capturing.erase(i) : std::next(i);
  for (auto i = event_capture.begin(); i != event_capture.end();) i = i->second == c ? event_capture.erase(i) : std::next(i);
  *g = c->invalid ? nullptr : (cudaGraph_t)c->graph;
  SAY("capture %llu ends: %zu nodes%s", c->id, c->graph->nodes.size(), c->invalid ? " INVALID" : "");
  return c->invalid ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* st) {
  LOCK;
  auto c = of(s);
  *st = !c ? cudaStreamCaptureStatusNone : c->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, cudaStreamCaptureStatus* st, unsigned long long* id, cudaGraph_t* g,
                                            const cudaGraphNode_t** d, size_t* n) {
  LOCK;
  auto c = of(s);
  *st = !c ? cudaStreamCaptureStatusNone : c->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  if (c) {
    if (id) *id = c->id;
    if (g) *g = (cudaGraph_t)c->graph;
    static cudaGraphNode_t none[1];
    if (d) *d = none;
    if (n) *n = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  *e = (cudaGraphExec_t)g;
  return g ? cudaSuccess : fail(cudaErrorInvalidValue);
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) { return cudaGraphInstantiate(e, g, 0); }
API cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) { return *n = g ? ((Graph*)g)->nodes.size() : 0, cudaSuccess; }
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, size_t* n) { return *n = 0, cudaSuccess; }
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t s) { return submit(s, "graph launch"), cudaSuccess; }
// ---- kernels
static std::unordered_map<const void*, const char*> names;
struct Config {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<Config> configs;
API void** __cudaRegisterFatBinary(void*) {
  static void* h[1];
  return h;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) { names[host] = name; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t n, void* s) {
  configs.push_back({g, b, n, s});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* n, void* s) {
  auto c = configs.back();
  configs.pop_back();
  *g = c.grid;
  *b = c.block;
  *n = c.shared;
  *(void**)s = c.stream;
  return cudaSuccess;
}
static std::string name_of(const void* f) {
  auto i = names.find(f);
  if (i == names.end()) return "kernel ?";
  int st;
  char* d = abi::__cxa_demangle(i->second, nullptr, nullptr, &st);
  std::string r = st ? i->second : d;
  free(d);
  return "kernel " + r.substr(0, 400);
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t n, cudaStream_t s) {
  if (!g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535 || (size_t)b.x * b.y * b.z > 1024) {
    SAY("VIOLATION: launch of %s with grid %u %u %u block %u %u %u", name_of(f).c_str(), g.x, g.y, g.z, b.x, b.y, b.z);
    violations++;
    return fail(cudaErrorInvalidConfiguration);
  }
  if (n > (size_t)SMEM()) {
    SAY("VIOLATION: %zu B shared memory for %s", n, name_of(f).c_str());
    violations++;
    return fail(cudaErrorInvalidValue);
  }
  submit(s, name_of(f));
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  return cudaLaunchKernel(f, c->gridDim, c->blockDim, a, c->dynamicSmemBytes, c->stream);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = CC();
  a->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int v) {
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize && v > SMEM()) {
    SAY("VIOLATION: %d B of shared memory asked for by %s", v, name_of(f).c_str());
    violations++;
    return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { return *n = 2, cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
static cudaError_t entry(const char* s, void** p, cudaDriverEntryPointQueryResult* r) {
  static void* self = dlopen("libcuda.so.1", RTLD_NOW);
  *p = self ? dlsym(self, s) : nullptr;
  if (r) *r = *p ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *p ? cudaSuccess : cudaErrorSymbolNotFound;
}
API cudaError_t cudaGetDriverEntryPoint(const char* s, void** p, unsigned long long, cudaDriverEntryPointQueryResult* r) { return entry(s, p, r); }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* s, void** p, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* r) {
  return entry(s, p, r);
}
// ---- cuBLAS
struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
  int batch = 1;
};
struct Desc {
  int ta = 0, tb = 0, epilogue = 1;
  void* bias = nullptr;
};
static cudaStream_t blas_stream = 0;
static thread_local cudaStream_t blas_stream_tl = 0;
API cublasStatus_t cublasCreate_v2(cublasHandle_t* h) {
  *h = (cublasHandle_t)malloc(64);
  if (unsafe("cublasCreate")) {}
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t s) { return blas_stream_tl = s, CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* m) { return *m = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* m) { return *m = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) { return CUBLAS_STATUS_SUCCESS; }
static std::string shape(const char* n, long m, long nn, long k, int ta, int tb, int type, int batch = 1) {
  char b[200];
  snprintf(b, 200, "%s m%ld n%ld k%ld %c%c type%d batch%d", n, m, nn, k, ta ? 'T' : 'N', tb ? 'T' : 'N', type, batch);
  return b;
}
API cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void*, const void*,
                                cudaDataType at, int, const void*, cudaDataType, int, const void*, void*, cudaDataType, int, cublasComputeType_t,
                                cublasGemmAlgo_t) {
  return submit(blas_stream_tl, shape("gemmEx", m, n, k, ta, tb, at)), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemm_v2(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float*, const float*, int,
                                  const float*, int, const float*, float*, int) {
  return submit(blas_stream_tl, shape("sgemm", m, n, k, ta, tb, 0)), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDgemm_v2(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const double*, const double*, int,
                                  const double*, int, const double*, double*, int) {
  return submit(blas_stream_tl, shape("dgemm", m, n, k, ta, tb, 1)), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemv_v2(cublasHandle_t, cublasOperation_t ta, int m, int n, const float*, const float*, int, const float*, int,
                                  const float*, float*, int) {
  return submit(blas_stream_tl, shape("sgemv", m, n, 1, ta, 0, 0)), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDgemv_v2(cublasHandle_t, cublasOperation_t ta, int m, int n, const double*, const double*, int, const double*, int,
                                  const double*, double*, int) {
  return submit(blas_stream_tl, shape("dgemv", m, n, 1, ta, 0, 1)), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void*,
                                              const void*, cudaDataType at, int, long long, const void*, cudaDataType, int, long long, const void*,
                                              void*, cudaDataType, int, long long, int b, cublasComputeType_t, cublasGemmAlgo_t) {
  return submit(blas_stream_tl, shape("gemmBatchedEx", m, n, k, ta, tb, at, b)), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float*,
                                             const float*, int, long long, const float*, int, long long, const float*, float*, int, long long,
                                             int b) {
  return submit(blas_stream_tl, shape("sgemmBatched", m, n, k, ta, tb, 0, b)), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const double*, const double*, int,
                                             long long, const double*, int, long long, const double*, double*, int, long long, int) {
  return submit(blas_stream_tl, "dgemmBatched"), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t, cudaDataType_t) {
  return *d = (cublasLtMatmulDesc_t) new Desc, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete (Desc*)d;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t h, cublasLtMatmulDescAttributes_t a, const void* v, size_t n) {
  auto d = (Desc*)h;
  switch ((int)a) {
  case CUBLASLT_MATMUL_DESC_TRANSA: d->ta = *(int*)v; break;
  case CUBLASLT_MATMUL_DESC_TRANSB: d->tb = *(int*)v; break;
  case CUBLASLT_MATMUL_DESC_EPILOGUE: d->epilogue = *(int*)v; break;
  case CUBLASLT_MATMUL_DESC_BIAS_POINTER: d->bias = *(void**)v; break;
  default: break;
  }
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType t, uint64_t r, uint64_t c, int64_t ld) {
  *l = (cublasLtMatrixLayout_t) new Layout{(int)t, r, c, ld};
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
  delete (Layout*)l;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
  return *p = (cublasLtMatmulPreference_t)malloc(256), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return free(p), CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t h, cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t D, cublasLtMatmulPreference_t, int,
                                                  cublasLtMatmulHeuristicResult_t* r, int* n) {
  memset(r, 0, sizeof *r);
  r->state = CUBLAS_STATUS_SUCCESS;
  *n = 1;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t h, const void*, const void* pa, cublasLtMatrixLayout_t A, const void* pb,
                                  cublasLtMatrixLayout_t B, const void*, const void*, cublasLtMatrixLayout_t, void* pd, cublasLtMatrixLayout_t D,
                                  const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t s) {
  auto d = (Desc*)h;
  auto a = (Layout*)A, b = (Layout*)B, o = (Layout*)D;
  char e[64];
  snprintf(e, 64, " epilogue%d->%d", d->epilogue, o->type);
  submit(s, shape("ltMatmul", o->rows, o->cols, d->ta ? a->rows : a->cols, d->ta, d->tb, a->type) + e);
  return CUBLAS_STATUS_SUCCESS;
}
// ---- driver
struct Function {
  std::string name;
  int shared = 0;
};
struct Module {
  std::string image;
};
API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* v) { return *v = 12080, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* n) { return *n = 1, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* d, int i) { return *d = i, CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) { return *v = attribute((int)a), CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* c) { return *c = (CUcontext)0x1, CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t* v, CUlimit) { return *v = 1 << 20, CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuCtxSynchronize() { return (CUresult)cudaDeviceSynchronize(); }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { return *c = (CUcontext)0x1, CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* a) {
  *f = 0;
  *a = 1;
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult, const char** s) { return *s = "fake driver error", CUDA_SUCCESS; }
API CUresult cuGetErrorName(CUresult, const char** s) { return *s = "fake", CUDA_SUCCESS; }
API CUresult cuModuleLoadData(CUmodule* m, const void*) {
  if (unsafe("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *m = (CUmodule) new Module;
  return CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule* m, const void* d, unsigned, CUjit_option*, void**) { return cuModuleLoadData(m, d); }
API CUresult cuModuleLoad(CUmodule* m, const char*) { return cuModuleLoadData(m, nullptr); }
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* n) {
  *f = (CUfunction) new Function{n};
  return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  return *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && v > SMEM()) {
    SAY("VIOLATION: %d B shared memory for %s", v, ((Function*)f)->name.c_str());
    violations++;
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
static CUresult launch(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned shared, CUstream s) {
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535) {
    SAY("VIOLATION: grid %u %u %u of triton %s", gx, gy, gz, ((Function*)f)->name.c_str());
    violations++;
    return CUDA_ERROR_INVALID_VALUE;
  }
  if ((int)shared > SMEM()) {
    SAY("VIOLATION: shared %u of triton %s", shared, ((Function*)f)->name.c_str());
    violations++;
    return CUDA_ERROR_INVALID_VALUE;
  }
  submit((cudaStream_t)s, "triton " + ((Function*)f)->name);
  return CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned, unsigned, unsigned, unsigned sh, CUstream s, void**,
                            void**) {
  return launch(f, gx, gy, gz, sh, s);
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  return launch(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->sharedMemBytes, c->hStream);
}
API CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned, unsigned, unsigned, unsigned sh, CUstream s,
                                       void**) {
  return launch(f, gx, gy, gz, sh, s);
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) { return *n = 2, CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { return *n = 66, CUDA_SUCCESS; }
API CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)v = p;
  else if (a == CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE || a == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(int*)v = 2;
  else *(int*)v = 0;
  return CUDA_SUCCESS;
}
API CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}
API CUresult cuLinkCreate_v2(unsigned, CUjit_option*, void**, CUlinkState*) { return CUDA_ERROR_NOT_SUPPORTED; }
API CUresult cuLinkAddData_v2(CUlinkState, CUjitInputType, void*, size_t, const char*, unsigned, CUjit_option*, void**) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
API CUresult cuLinkComplete(CUlinkState, void**, size_t*) { return CUDA_ERROR_NOT_SUPPORTED; }
// ---- for Python, by ctypes
API void fake_reset() {
  LOCK;
  counted.clear();
  violations = syncs = pageable = mallocs = hostallocs = 0;
  peak = used;
}
API long fake_number(const char* n) {
  LOCK;
  std::string s = n;
  if (s == "total") {
    long t = 0;
    for (auto& c : counted)
      if (c.first.rfind("cuda", 0)) t += c.second;
    return t;
  }
  return s == "violations"   ? violations
         : s == "syncs"      ? syncs
         : s == "pageable"   ? pageable
         : s == "mallocs"    ? mallocs
         : s == "hostallocs" ? hostallocs
         : s == "used"       ? (long)used
         : s == "peak"       ? (long)peak
                             : -1;
}
API void fake_dump(const char* path) {
  LOCK;
  FILE* f = fopen(path, "w");
  for (auto& c : counted) fprintf(f, "%ld\t%s\n", c.second, c.first.c_str());
  fclose(f);
}
