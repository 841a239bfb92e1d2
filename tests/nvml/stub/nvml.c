/* A stand-in for libnvidia-ml.so.1, so that the ctypes side of driver/gpuslice/nvml/real.py runs without a GPU.
 *
 * One H100 in MIG mode with four profiles (index 1 has fallen off the bus). Struct layouts are those of nvml.h, CUDA 13.
 * After stub_odd, index 1 is a second such card, of which one function answers as it was told (test_odd_card.py).
 * It is strict where pynvml is not: wrong struct versions and by-value structs fail here instead of passing unseen.
 *
 * The variable STUB_NVML makes it another card or driver: "NAME=NUMBER NAME=NUMBER". The name of a function below lets that
 * function fail with this code; the other names are those that `told` is asked for.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NO_SUCH = 6, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15, IN_USE = 19, NO_ROOM = 23 };
typedef int ret;
typedef unsigned u;
typedef unsigned long long ull;
#define WHOLE 0xFFFFFFFFu
#define UUID "GPU-00000000-1111-2222-3333-444444444444"

typedef struct { u start, size; } place;
typedef struct { int gi; int on; } mig_device;
typedef struct { u version, id, p2p, slices, count, sm, ce, dec, enc, jpg, ofa; ull mib; char name[96]; } gi_profile;
typedef struct { u version, id, slices, count, sm, ce, dec, enc, jpg, ofa; char name[96]; } ci_profile;
typedef struct gi { int on; u id, profile; place at; int ci; u ci_profile; char uuid[64]; } gi;
typedef struct { void *device; u id, profile; place at; } gi_info;
typedef struct { void *device; gi *parent; u id, profile; place at; } ci_info;
typedef struct { char legacy[16]; u domain, bus, device, id, subsystem; char bus_id[32]; } pci;
typedef struct { u version; ull total, reserved, free, used; } memory_v2;
typedef struct { ull total, free, used; } memory_v1;
typedef struct { u pid; ull used; u gi, ci; } process;
typedef struct { u field, scope; int64_t time, latency; u type; int code; union { u ui; ull ul; } value; } field;
typedef struct { void *device; ull type, data; u gi, ci; } event;

/* enum -> profile. 1g+me misreports its instance count, as an A30 does. */
static const struct { u which; gi_profile p; u starts, first, step, size; } profiles[] = {
    {0, {0, 19, 0, 1, 7, 16, 1, 1, 0, 1, 0, 9984, "MIG 1g.10gb"}, 7, 0, 1, 1},
    {7, {0, 20, 0, 1, 40, 16, 1, 1, 0, 1, 1, 9984, "MIG 1g.10gb+me"}, 7, 0, 1, 1},
    {2, {0, 9, 0, 3, 2, 60, 3, 3, 0, 3, 0, 40448, "MIG 3g.40gb"}, 2, 0, 4, 4},
    {4, {0, 0, 0, 7, 1, 132, 8, 7, 0, 7, 1, 81152, "MIG 7g.80gb"}, 1, 0, 1, 8},
};
#define PROFILES (sizeof profiles / sizeof *profiles)
static int card, mode = 1, compute_mode, sessions, created, waits;
static gi instances[15];

/* What the odd card answers when this function is called: an error code, or one of these. */
enum { HANG = -1, FILL = -2, EMPTY = -3, TWIN = -4 };
#define TWO "GPU-00000000-1111-2222-3333-555555555555"
static char odd_function[64];
static int odd_effect, odd_card;
void stub_odd(const char *function, int effect) {
    snprintf(odd_function, sizeof odd_function, "%s", function);
    odd_effect = effect;
}

/* -1 where the call goes its usual way, else what it returns. */
static int odd(const char *function, int of_odd, void *out, size_t size) {
    if (!of_odd || strcmp(function, odd_function)) return -1;
    if (odd_effect == HANG) for (;;) pause();
    if (odd_effect == TWIN) { snprintf(out, size, UUID); return OK; }
    if (odd_effect < 0 && !size) return 999; /* there is nothing to fill in but a pointer */
    if (odd_effect == FILL || odd_effect == EMPTY) {
        memset(out, odd_effect == FILL ? 0xFF : 0, size);
        if (size > 8) ((char *)out)[size - 1] = 0; /* a text ends somewhere */
        return OK;
    }
    return odd_effect;
}
#define ODD_IF(condition, out, size) do { int r = odd(__func__, condition, out, size); if (r >= 0) return r; } while (0)
#define ODD(out, size) ODD_IF(d == &odd_card, out, size)

static int is_mig(void *d) { return (char *)d >= (char *)instances && (char *)d < (char *)(instances + 15); }
static u told(const char *name, u otherwise) {
    const char *all = getenv("STUB_NVML");
    for (size_t n = strlen(name); all && *all; all += strcspn(all, " "), all += *all == ' ')
        if (!strncmp(all, name, n) && all[n] == '=') return (u)atoi(all + n + 1);
    return otherwise;
}
#define MAY_FAIL do { u code = told(__func__, OK); if (code) return (ret)code; } while (0)
static int by_id(u id) { for (u i = 0; i < PROFILES; i++) if (profiles[i].p.id == id) return (int)i; return -1; }

ret nvmlInitWithFlags(u flags) { ODD_IF(1, NULL, 0); (void)flags; sessions++; return OK; }
ret nvmlShutdown(void) { ODD_IF(1, NULL, 0); return sessions-- > 0 ? OK : 1; }
const char *nvmlErrorString(ret code) { (void)code; return "stub"; }
ret nvmlSystemGetDriverVersion(char *out, u n) { ODD_IF(1, out, n); snprintf(out, n, "580.65.06"); return OK; }
ret nvmlSystemGetCudaDriverVersion_v2(int *out) { ODD_IF(1, out, sizeof *out); *out = 13000; return OK; }
ret nvmlDeviceGetCount_v2(u *n) { ODD_IF(1, n, sizeof *n); *n = 2; return OK; }
ret nvmlDeviceGetHandleByIndex_v2(u i, void **d) {
    ODD_IF(i == 1, d, 0);
    *d = i ? &odd_card : &card;
    return i == 0 || (i == 1 && *odd_function) ? OK : i == 1 ? LOST : INVALID;
}
ret nvmlDeviceGetHandleByUUID(const char *uuid, void **d) {
    if (!strcmp(uuid, UUID)) { *d = &card; return OK; }
    if (*odd_function && !strcmp(uuid, TWO)) { *d = &odd_card; return OK; }
    for (int i = 0; i < 15; i++)
        if (instances[i].on && !strcmp(uuid, instances[i].uuid)) { *d = &instances[i]; return OK; }
    return NO_SUCH;
}
ret nvmlDeviceGetUUID(void *d, char *out, u n) {
    ODD(out, n);
    int partition = is_mig(d) && !told("partitions-have-the-uuid-of-the-card", 0);
    snprintf(out, n, "%s", partition ? ((gi *)d)->uuid : d == &odd_card ? TWO : UUID);
    return OK;
}
ret nvmlDeviceGetName(void *d, char *out, u n) { ODD(out, n); (void)d; snprintf(out, n, "NVIDIA H100 80GB HBM3"); return OK; }
ret nvmlDeviceGetPciInfo_v3(void *d, pci *out) {
    ODD(out, sizeof *out);
    strcpy(out->bus_id, d == &odd_card ? "00000000:FD:1F.0" : "00000000:FE:1F.0"); /* a slot that no machine has, so that sysfs stays silent */
    return OK;
}
ret nvmlDeviceGetMemoryInfo(void *d, memory_v1 *out) {
    ODD(out, sizeof *out);
    MAY_FAIL;
    *out = (memory_v1){81559ull << 20, 81557ull << 20, 2 << 20};
    return OK;
}
ret nvmlDeviceGetMemoryInfo_v2(void *d, memory_v2 *out) {
    ODD(&out->total, 3 * sizeof out->total);
    MAY_FAIL;
    if (out->version != 0x02000028) return INVALID;
    ull total = is_mig(d) ? profiles[by_id(((gi *)d)->profile)].p.mib << 20 : 81559ull << 20;
    *out = (memory_v2){out->version, total, 407ull << 20, total - (1 << 20), 1 << 20};
    return OK;
}
ret nvmlDeviceGetCudaComputeCapability(void *d, int *a, int *b) { ODD(a, sizeof *a); *a = 9; *b = 0; return OK; }
ret nvmlDeviceGetArchitecture(void *d, u *out) { ODD(out, sizeof *out); *out = told("architecture", 9); return OK; }
ret nvmlDeviceGetMinorNumber(void *d, u *out) { ODD(out, sizeof *out); *out = 3; return OK; }
ret nvmlDeviceGetFieldValues(void *d, int n, field *f) {
    ODD(&f->code, sizeof f->code);
    (void)d;
    MAY_FAIL;
    for (int i = 0; i < n; i++) { f[i].code = f[i].field == 184 ? OK : UNSUPPORTED; f[i].value.ui = 1; }
    return OK;
}
ret nvmlDeviceGetMigMode(void *d, u *now, u *pending) { ODD(now, sizeof *now); MAY_FAIL; *now = *pending = (u)mode; return OK; }
ret nvmlDeviceSetMigMode(void *d, u on, ret *status) {
    ODD(status, sizeof *status); /* success, and the refusal is in the status */
    (void)d;
    *status = OK;
    for (int i = 0; i < 15; i++) if (instances[i].on) *status = IN_USE;
    if (*status == OK) mode = (int)on;
    return OK;
}
ret nvmlDeviceGetGpuInstanceProfileInfoV(void *d, u which, gi_profile *out) { 
    ODD(&out->id, sizeof *out - 4);
    (void)d;
    MAY_FAIL;
    if (out->version != 0x02000098) return INVALID;
    for (u i = 0; i < PROFILES; i++)
        if (profiles[i].which == which) { *out = profiles[i].p; return OK; }
    return which < 0x12 ? UNSUPPORTED : INVALID;
}
ret nvmlDeviceGetGpuInstancePossiblePlacements_v2(void *d, u id, place *out, u *n) { 
    ODD(n, sizeof *n);
    (void)d;
    int p = by_id(id);
    if (p < 0) return INVALID;
    if (out && *n < profiles[p].starts) return TOO_SMALL;
    *n = told("profile-without-a-place", WHOLE) == id ? 0 : profiles[p].starts;
    for (u i = 0; out && i < *n; i++) out[i] = (place){profiles[p].first + i * profiles[p].step, profiles[p].size};
    return OK;
}
ret nvmlDeviceCreateGpuInstanceWithPlacement(void *d, u id, const place *at, gi **out) { 
    ODD(out, 0);
    (void)d;
    if (!mode) return UNSUPPORTED;
    int p = by_id(id), free = -1;
    if (p < 0 || at->size != profiles[p].size || at->start >= 8) return INVALID;
    for (int i = 14; i >= 0; i--) {
        if (!instances[i].on) { free = i; continue; }
        if (at->start < instances[i].at.start + instances[i].at.size && instances[i].at.start < at->start + at->size)
            return NO_ROOM;
    }
    instances[free] = (gi){1, (u)free, id, *at, -1, 0, ""};
    *out = &instances[free];
    return OK;
}
ret nvmlDeviceGetGpuInstances(void *d, u id, gi **out, u *n) { 
    ODD(n, sizeof *n);
    (void)d;
    *n = 0;
    for (int i = 0; i < 15; i++) if (instances[i].on && instances[i].profile == id) out[(*n)++] = &instances[i];
    return OK;
}
ret nvmlDeviceGetGpuInstanceById(void *d, u id, gi **out) {
    (void)d;
    if (id >= 15 || !instances[id].on) return NO_SUCH;
    *out = &instances[id];
    return OK;
}
ret nvmlGpuInstanceGetInfo(gi *g, gi_info *out) { *out = (gi_info){&card, g->id, g->profile, g->at}; return OK; }
ret nvmlGpuInstanceDestroy(gi *g) { if (g->ci >= 0) return IN_USE; g->on = 0; return OK; }
ret nvmlGpuInstanceGetComputeInstanceProfileInfoV(gi *g, u which, u engine, ci_profile *out) {
    static const u widths[9] = {1, 2, 3, 4, 7, 8, 6, 1, 7};
    MAY_FAIL;
    if (out->version != 0x02000088 || engine || which >= 9) return INVALID;
    if (widths[which] > profiles[by_id(g->profile)].p.slices || (widths[which] == 7 && which == 8)) return UNSUPPORTED;
    *out = (ci_profile){out->version, 100 + which, widths[which], 1, 0, 0, 0, 0, 0, 0, ""};
    return OK;
}
ret nvmlGpuInstanceCreateComputeInstance(gi *g, u id, gi **out) { /* a compute instance is its GPU instance here */
    if (g->ci >= 0) return NO_ROOM;
    g->ci = 0;
    g->ci_profile = id;
    snprintf(g->uuid, sizeof g->uuid, "MIG-00000000-0000-0000-0000-%012d", ++created);
    *out = g;
    return OK;
}
ret nvmlGpuInstanceGetComputeInstances(gi *g, u id, gi **out, u *n) {
    *n = g->ci >= 0 && g->ci_profile == id;
    if (*n) *out = g;
    return OK;
}
ret nvmlGpuInstanceGetComputeInstanceById(gi *g, u id, gi **out) {
    *out = g;
    return g->ci == (int)id ? OK : NO_SUCH;
}
ret nvmlComputeInstanceGetInfo_v2(gi *g, ci_info *out) {
    *out = (ci_info){g, g, (u)g->ci, g->ci_profile, {0, profiles[by_id(g->profile)].p.slices}};
    return OK;
}
ret nvmlComputeInstanceDestroy(gi *g) { g->ci = -1; return OK; }
static ret listed(u *n, process *out, u gi, u ci) { /* one process; both lists name it */
    if (!out) { *n = 1; return TOO_SMALL; }
    *n = 1;
    *out = (process){4242, 5 << 20, gi, ci};
    return OK;
}
ret nvmlDeviceGetComputeRunningProcesses_v3(void *d, u *n, process *out) { ODD(n, sizeof *n); return listed(n, out, WHOLE, WHOLE); }
ret nvmlDeviceGetGraphicsRunningProcesses_v3(void *d, u *n, process *out) { ODD(n, sizeof *n); return listed(n, out, WHOLE, WHOLE); }
ret nvmlDeviceGetMPSComputeRunningProcesses_v3(void *d, u *n, process *out) { ODD(n, sizeof *n); (void)n; (void)out; return UNSUPPORTED; }
ret nvmlDeviceGetComputeMode(void *d, int *out) { ODD(out, sizeof *out); *out = compute_mode; return OK; }
ret nvmlDeviceSetComputeMode(void *d, int to) { ODD(&to, 0); (void)d; if (mode) return UNSUPPORTED; compute_mode = to; return OK; }
ret nvmlEventSetCreate(void **out) { *out = &waits; return OK; }
ret nvmlEventSetFree(void *set) { (void)set; return OK; }
ret nvmlDeviceGetSupportedEventTypes(void *d, ull *out) { (void)d; MAY_FAIL; *out = 0x8 | 0x2; return OK; }
ret nvmlDeviceRegisterEvents(void *d, ull types, void *set) { (void)d; (void)set; return types == 0x8 ? OK : INVALID; }
ret nvmlEventSetWait_v2(void *set, event *out, u ms) { /* a whole-GPU XID, one of an instance, no XID, a loss, then nothing */
    (void)set; (void)ms;
    switch (waits++) {
    case 0: *out = (event){&card, 0x8, 48, WHOLE, WHOLE}; return OK;
    case 1: *out = (event){&card, 0x8, 94, 2, 0}; return OK;
    case 2: *out = (event){&card, 0x2, 1, WHOLE, WHOLE}; return OK;
    case 3: return LOST;
    default: return TIMEOUT;
    }
}
