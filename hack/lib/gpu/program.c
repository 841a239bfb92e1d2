/* A CUDA program that needs neither a CUDA toolkit nor its runtime: only libcuda, and kernels as PTX.
 *
 * The program takes a context on its first device and prints a line about it. Then it runs the commands in its arguments,
 * one per argument ("allocate 1024"). After an argument "-" it reads commands from standard input, one per line. It answers
 * each command with one line: "ok …", or "error CODE NAME" (cuda.h). Exit status 1 if CUDA fails before the first command.
 *
 *   memory         free and total memory, MiB
 *   allocate MIB   device memory, kept
 *   touch MIB      device memory, kept and written by a kernel
 *   managed MIB    managed memory, kept and written by a kernel
 *   spin ROUNDS    one kernel of a fixed amount of work, timed
 *   second S       such kernels one after the other for S seconds: how many
 *   fault          a kernel writes to an address that is not mapped
 *   uid            user and process id
 *   hold           wait for SIGTERM
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char PTX[] =
    ".version 7.0\n.target sm_70\n.address_size 64\n"
    /* out[0] is written only if the sum has an impossible value. So no compiler can remove the loop. */
    ".visible .entry spin(.param .u64 p_out, .param .u32 p_rounds) {\n"
    "  .reg .pred %p<3>; .reg .f32 %f<3>; .reg .b32 %r<4>; .reg .b64 %d<2>;\n"
    "  ld.param.u64 %d1, [p_out]; ld.param.u32 %r1, [p_rounds];\n"
    "  mov.u32 %r2, %tid.x; cvt.rn.f32.u32 %f1, %r2;\n"
    "again:\n"
    "  fma.rn.f32 %f1, %f1, 0f3F800347, 0f3F000000;\n"
    "  sub.u32 %r1, %r1, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra again;\n"
    "  setp.eq.f32 %p2, %f1, 0fC0490FDB; @%p2 st.global.f32 [%d1], %f1;\n"
    "  ret;\n}\n"
    /* One byte in each 4 KiB of the n pages from p on. */
    ".visible .entry touch(.param .u64 p_p, .param .u32 p_pages) {\n"
    "  .reg .pred %p<2>; .reg .b32 %r<7>; .reg .b64 %d<4>;\n"
    "  ld.param.u64 %d1, [p_p]; ld.param.u32 %r1, [p_pages];\n"
    "  mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x; mad.lo.u32 %r5, %r2, %r3, %r4;\n"
    "  setp.ge.u32 %p1, %r5, %r1; @%p1 bra done;\n"
    "  mul.wide.u32 %d2, %r5, 4096; add.u64 %d3, %d1, %d2; mov.u32 %r6, 7; st.global.u8 [%d3], %r6;\n"
    "done:\n  ret;\n}\n";

enum { ATTRIBUTE_MULTIPROCESSORS = 16, ATTACH_GLOBAL = 1 }; /* cuda.h */
enum { BLOCKS = 2112 }; /* of a timed kernel: the same work for any number of multiprocessors */

typedef int Result;
typedef uint64_t Pointer;

static Result (*init)(unsigned), (*device_get)(int *, int), (*device_name)(char *, int, int), (*attribute)(int *, int, int);
static Result (*retain)(void **, int), (*set_current)(void *), (*memory)(size_t *, size_t *), (*bus_id)(char *, int, int);
static Result (*load)(void **, const void *), (*function)(void **, void *, const char *), (*synchronize)(void);
static Result (*allocate)(Pointer *, size_t), (*allocate_managed)(Pointer *, size_t, unsigned), (*error_name)(Result, const char **);
static Result (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);

static const struct { void *to; const char *name; } SYMBOLS[] = {
    {&init, "cuInit"}, {&device_get, "cuDeviceGet"}, {&device_name, "cuDeviceGetName"}, {&attribute, "cuDeviceGetAttribute"},
    {&retain, "cuDevicePrimaryCtxRetain"}, {&set_current, "cuCtxSetCurrent"}, {&memory, "cuMemGetInfo_v2"},
    {&bus_id, "cuDeviceGetPCIBusId"}, {&load, "cuModuleLoadData"}, {&function, "cuModuleGetFunction"},
    {&synchronize, "cuCtxSynchronize"}, {&allocate, "cuMemAlloc_v2"}, {&allocate_managed, "cuMemAllocManaged"},
    {&error_name, "cuGetErrorName"}, {&launch, "cuLaunchKernel"},
};

static int processors;
static void *spinning, *touching;
static Pointer out;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static void answer(Result e, const char *text) {
  const char *name = "?";
  if (e) {
    error_name(e, &name);
    printf("error %d %s\n", e, name ? name : "?");
  } else {
    printf("ok %s\n", text);
  }
  fflush(stdout);
}

static Result spin(unsigned rounds) {
  void *arguments[] = {&out, &rounds};
  Result e = launch(spinning, BLOCKS, 1, 1, 256, 1, 1, 0, NULL, arguments, NULL);
  return e ? e : synchronize();
}

static Result touch(Pointer p, unsigned pages) {
  void *arguments[] = {&p, &pages};
  Result e = launch(touching, (pages + 255) / 256, 1, 1, 256, 1, 1, 0, NULL, arguments, NULL);
  return e ? e : synchronize();
}

static void end(int number) { (void)number; _exit(0); }

static void obey(const char *line) {
  char word[16] = "", text[128] = "";
  long n = 0, count = 0;
  size_t free_, total;
  Pointer p = 0;
  Result e = 0;
  double begun = now();
  sscanf(line, "%15s %ld", word, &n);
  if (!strcmp(word, "memory")) {
    e = memory(&free_, &total);
    snprintf(text, sizeof text, "free=%zu total=%zu", free_ >> 20, total >> 20);
  } else if (!strcmp(word, "allocate")) {
    e = allocate(&p, (size_t)n << 20);
  } else if (!strcmp(word, "touch") || !strcmp(word, "managed")) {
    e = *word == 't' ? allocate(&p, (size_t)n << 20) : allocate_managed(&p, (size_t)n << 20, ATTACH_GLOBAL);
    if (!e) e = touch(p, n << 8);
    snprintf(text, sizeof text, "ms=%.1f", (now() - begun) * 1e3);
  } else if (!strcmp(word, "spin")) {
    e = spin(n);
    snprintf(text, sizeof text, "ms=%.1f", (now() - begun) * 1e3);
  } else if (!strcmp(word, "second")) {
    for (; !e && now() - begun < n; count++) e = spin(20000);
    snprintf(text, sizeof text, "kernels=%ld seconds=%.2f", count, now() - begun);
  } else if (!strcmp(word, "fault")) {
    e = touch(16, 1);
  } else if (!strcmp(word, "uid")) {
    snprintf(text, sizeof text, "uid=%d pid=%d", (int)getuid(), (int)getpid());
  } else if (!strcmp(word, "hold")) {
    signal(SIGTERM, end);
    answer(0, "holding");
    for (;;) pause();
  } else {
    snprintf(text, sizeof text, "unknown command %.40s", line);
  }
  answer(e, text);
}

int main(int count, char **arguments) {
  char line[256], text[400], name[128] = "", bus[32] = "";
  void *library = dlopen("libcuda.so.1", RTLD_NOW), *context, *module;
  int device = 0;
  size_t free_ = 0, total = 0;
  double begun = now();
  if (!library) {
    printf("error -1 %s\n", dlerror());
    return 1;
  }
  for (size_t i = 0; i < sizeof SYMBOLS / sizeof *SYMBOLS; i++)
    if (!(*(void **)SYMBOLS[i].to = dlsym(library, SYMBOLS[i].name))) {
      printf("error -1 libcuda.so.1 has no %s\n", SYMBOLS[i].name);
      return 1;
    }
  Result e = init(0);
  if (!e) e = device_get(&device, 0);
  if (!e) e = retain(&context, device);
  if (!e) e = set_current(context);
  if (!e) e = memory(&free_, &total);
  if (!e) e = attribute(&processors, ATTRIBUTE_MULTIPROCESSORS, device);
  if (!e) e = device_name(name, sizeof name, device);
  if (!e) e = bus_id(bus, sizeof bus, device);
  if (!e) e = load(&module, PTX);
  if (!e) e = function(&spinning, module, "spin");
  if (!e) e = function(&touching, module, "touch");
  if (!e) e = allocate(&out, 4);
  snprintf(text, sizeof text, "free=%zu total=%zu sms=%d bus=%s context=%.3f name=%s", free_ >> 20, total >> 20, processors,
           bus, now() - begun, name);
  answer(e, text);
  if (e) return 1;
  for (int i = 1; i < count; i++) {
    if (strcmp(arguments[i], "-")) obey(arguments[i]);
    else while (fgets(line, sizeof line, stdin)) obey(line);
  }
  return 0;
}
