/* Launches again the kernels of a call that was recorded, for other tensors: what Triton's Python does takes longer than they do.
 *
 * A Family has the calls of layers that are alike in all but the values of their tensors, a Plan for each number of tokens. A
 * Runner is one layer. Calling it with a tensor looks for a plan, allocates the result, and launches. It gives None where there
 * is no plan, or the tensor is of a kind that plans are not made for: the caller then goes the long way.
 *
 * Layers that read one activation share its codes: if the first steps of two plans are the same, down to every parameter, and
 * both are called with one tensor that nobody wrote to in between, the second begins where the first has come to.
 *
 * Tensors are read through the exchange API of DLPack, which torch offers for this (torch.Tensor.__dlpack_c_exchange_api__). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <ATen/dlpack.h>
#include <cuda.h>
#include <dlfcn.h>

#define MOST_PLANS 256 /* of a family; the next one takes the place of the oldest */
#define MOST_PARAMETERS 64 /* of a kernel */
#define MOST_MAPS 6
#define MOST_TENSORS 24 /* of a layer */
#define MOST_DIMENSIONS 8
enum { INPUT, RESULT, CODES, SCRATCH, TENSORS }; /* what addresses are relative to; from TENSORS on those of the layer */
enum { VALUE, ADDRESS, MAP };

struct parameter { /* as launch.py packs it */
    uint32_t kind, slot;
    uint64_t offset;
    uint8_t value[128]; /* VALUE: the bytes; MAP: the tensor map with any address */
};

struct step {
    uint64_t function; /* 0: zeros are written to where the only parameter is */
    uint64_t bytes;    /* so many of them */
    uint32_t grid[3], threads, shared, early;
    uint32_t first, count; /* parameters */
};

struct key {
    int64_t tokens, stride, step; /* stride of a row, 0 for a single one, and of an element */
    uint8_t code, bits;           /* of the dtype, as in DLPack */
    bool aligned;                 /* to 16 bytes */
};

typedef struct {
    PyObject_HEAD
    struct key key;
    PyObject *dtype, *sizes, *strides, *room, *room_strides, *bytes; /* of the result, and of the scratch */
    Py_ssize_t scratch, steps;
    Py_ssize_t codes, apart; /* bytes of codes, and how many steps make them */
    uint64_t share;          /* a number of these steps, the same in all plans that begin with them; 0: they are not shared */
    PyObject *codes_room, *own_room; /* sizes of memory for codes, and for scratch without them */
    bool refused; /* there can be none for its key */
    struct step *step;
    struct parameter *parameter;
} Plan;

typedef struct {
    PyObject_HEAD
    int64_t in_features, out_features;
    int device_type, device, tensors;
    uint32_t aligned; /* a bit for each tensor of the layer */
    int count, oldest;
    Plan *plans[MOST_PLANS];
} Family;

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    Family *family;
    PyObject *tensors;
    Py_ssize_t takers; /* so many others read what this one does, as far as was seen */
} Runner;

/* The last codes that were made for others to take, or would have been, had it been known that there are others. */
static struct {
    PyObject *of, *codes; /* a weak reference to the input, and the codes or NULL */
    Runner *maker;        /* borrowed: it clears this when it goes */
    uint64_t input, address, share;
    long long version; /* of the input: PyTorch counts what is written to a tensor, as for gradients */
    void *stream;
    Py_ssize_t taken;
} kept;

static const DLPackExchangeAPI *api;
static PyObject *tensor_type, *empty_strided, *byte_type, *version_name, *inference_name;
static CUresult (*launch_kernel)(const CUlaunchConfig *, CUfunction, void **, void **);
static CUresult (*replace_address)(CUtensorMap *, void *);
static CUresult (*encode_map)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                              const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static CUresult (*write_zeros)(CUdeviceptr, unsigned char, size_t, CUstream);
static CUresult (*current_device)(CUdevice *);
static CUresult (*is_capturing)(CUstream, CUstreamCaptureStatus *);
static CUresult (*error_string)(CUresult, const char **);

static PyObject *failed(CUresult result) {
    const char *said = NULL;
    error_string(result, &said);
    PyErr_Format(PyExc_RuntimeError, "CUDA error in a kernel of quantkit: %s", said ? said : "unknown");
    return NULL;
}

/* ---- plans */

static void plan_free(Plan *plan) {
    Py_XDECREF(plan->dtype);
    Py_XDECREF(plan->sizes);
    Py_XDECREF(plan->strides);
    Py_XDECREF(plan->room);
    Py_XDECREF(plan->room_strides);
    Py_XDECREF(plan->codes_room);
    Py_XDECREF(plan->own_room);
    PyMem_Free(plan->step);
    PyMem_Free(plan->parameter);
    Py_TYPE(plan)->tp_free((PyObject *)plan);
}

static PyTypeObject PlanType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "quantkit.Plan",
    .tp_basicsize = sizeof(Plan),
    .tp_dealloc = (destructor)plan_free,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

static bool same(const struct key *a, const struct key *b) {
    return a->tokens == b->tokens && a->stride == b->stride && a->step == b->step && a->code == b->code && a->bits == b->bits &&
           a->aligned == b->aligned;
}

static Plan *find(const Family *family, const struct key *key) {
    for (int i = 0; i < family->count; i++)
        if (same(&family->plans[i]->key, key)) return family->plans[i];
    return NULL;
}

/* ---- tensors */

static bool described(PyObject *tensor, DLTensor *out) {
    if (api->dltensor_from_py_object_no_sync(tensor, out) == 0) return true;
    PyErr_Clear();
    return false;
}

static uint64_t address_of(const DLTensor *t) { return t->data ? (uint64_t)(uintptr_t)t->data + t->byte_offset : 0; }

/* The key of x, if it is a matrix of rows, however many dimensions those have. */
static bool keyed(const Family *family, const DLTensor *x, struct key *key) {
    const int last = x->ndim - 1;
    if (x->device.device_type != (DLDeviceType)family->device_type || x->device.device_id != family->device) return false;
    if (last < 0 || last >= MOST_DIMENSIONS || !x->data || x->dtype.lanes != 1 || x->shape[last] != family->in_features)
        return false;
    int64_t rows = 1, stride = 0;
    for (int d = last - 1; d >= 0; d--) {
        const int64_t size = x->shape[d];
        if (size == 0) return false;
        if (size == 1) continue;
        if (rows == 1)
            stride = x->strides[d];
        else if (x->strides[d] != stride * rows)
            return false;
        rows *= size;
    }
    *key = (struct key){rows, stride, x->strides[last], x->dtype.code, x->dtype.bits, address_of(x) % 16 == 0};
    return true;
}

static PyObject *allocated(PyObject *sizes, PyObject *strides, PyObject *dtype, uint64_t *address) {
    PyObject *arguments[] = {sizes, strides, dtype}, *tensor = PyObject_Vectorcall(empty_strided, arguments, 3, NULL);
    DLTensor t;
    if (!tensor) return NULL;
    if (!described(tensor, &t) || !t.data) {
        Py_DECREF(tensor);
        PyErr_SetString(PyExc_RuntimeError, "a tensor that was just made has no memory");
        return NULL;
    }
    *address = address_of(&t);
    return tensor;
}

/* Sizes of the result, and contiguous strides for them. */
static bool shaped(const DLTensor *x, int64_t out_features, PyObject **sizes, PyObject **strides) {
    int64_t stride = 1;
    *sizes = PyTuple_New(x->ndim);
    *strides = PyTuple_New(x->ndim);
    if (!*sizes || !*strides) return false;
    for (int d = x->ndim - 1; d >= 0; d--) {
        const int64_t size = d == x->ndim - 1 ? out_features : x->shape[d];
        PyObject *a = PyLong_FromLongLong(size), *b = PyLong_FromLongLong(stride);
        if (!a || !b) {
            Py_XDECREF(a);
            Py_XDECREF(b);
            return false;
        }
        PyTuple_SET_ITEM(*sizes, d, a);
        PyTuple_SET_ITEM(*strides, d, b);
        stride *= size;
    }
    return true;
}

/* ---- launching */

static CUresult launched(const struct step *step, const struct parameter *parameters, const uint64_t *slots, CUstream stream) {
    void *pointers[MOST_PARAMETERS];
    uint64_t addresses[MOST_PARAMETERS];
    CUtensorMap maps[MOST_MAPS];
    int used = 0;
    for (uint32_t i = 0; i < step->count; i++) {
        const struct parameter *p = parameters + step->first + i;
        if (p->kind == VALUE) {
            pointers[i] = (void *)p->value;
            continue;
        }
        addresses[i] = slots[p->slot] + p->offset;
        pointers[i] = &addresses[i];
        if (p->kind == MAP) {
            memcpy(&maps[used], p->value, sizeof(CUtensorMap));
            const CUresult result = replace_address(&maps[used], (void *)(uintptr_t)addresses[i]);
            if (result != CUDA_SUCCESS) return result;
            pointers[i] = &maps[used++];
        }
    }
    if (!step->function) return write_zeros(addresses[0], 0, step->bytes, stream);
    CUlaunchAttribute early = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION};
    early.value.programmaticStreamSerializationAllowed = 1;
    const CUlaunchConfig config = {
        .gridDimX = step->grid[0], .gridDimY = step->grid[1], .gridDimZ = step->grid[2],
        .blockDimX = step->threads, .blockDimY = 1, .blockDimZ = 1,
        .sharedMemBytes = step->shared, .hStream = stream, .attrs = &early, .numAttrs = step->early ? 1 : 0,
    };
    return launch_kernel(&config, (CUfunction)(uintptr_t)step->function, pointers, NULL);
}

static CUresult played(const Plan *plan, Py_ssize_t first, const uint64_t *slots, CUstream stream) {
    for (Py_ssize_t i = first; i < plan->steps; i++) {
        const CUresult result = launched(plan->step + i, plan->parameter, slots, stream);
        if (result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
}

/* ---- shared codes */

/* How often x was written to, if that is counted, and its codes may outlive this call. */
static bool lasting(PyObject *x, void *stream, long long *version) {
    CUstreamCaptureStatus status;
    if (is_capturing(stream, &status) != CUDA_SUCCESS || status != CU_STREAM_CAPTURE_STATUS_NONE) return false;
    PyObject *uncounted = PyObject_CallMethodNoArgs(x, inference_name); /* asked first: an error takes 10 us */
    Py_XDECREF(uncounted);
    PyObject *number = uncounted == Py_False ? PyObject_GetAttr(x, version_name) : NULL;
    *version = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    if (*version >= 0) return true;
    PyErr_Clear();
    return false;
}

static bool is_kept(const Plan *plan, PyObject *x, uint64_t input, void *stream, long long version) {
    if (kept.share != plan->share || kept.input != input || kept.stream != stream || kept.version != version) return false;
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *of = NULL;
    const bool same = PyWeakref_GetRef(kept.of, &of) == 1 && of == x;
    Py_XDECREF(of);
    return same;
#else
    return PyWeakref_GetObject(kept.of) == x;
#endif
}

/* Steals the references; what was kept before is let go last, since that may call anything. */
static void keep(PyObject *of, PyObject *codes, Runner *maker, const Plan *plan, const uint64_t *slots, void *stream,
                 long long version) {
    PyObject *before[] = {kept.of, kept.codes};
    memset(&kept, 0, sizeof(kept));
    if (of) {
        kept.of = of, kept.codes = codes, kept.maker = maker, kept.share = plan->share, kept.version = version;
        kept.input = slots[INPUT], kept.address = slots[CODES], kept.stream = stream;
    }
    Py_XDECREF(before[0]);
    Py_XDECREF(before[1]);
}

/* The codes for this plan, a new reference, if they are there. Others that want them are counted either way. */
static PyObject *take_codes(uint64_t *address) {
    PyObject *codes = kept.codes;
    kept.taken++;
    *address = kept.address;
    if (kept.taken > kept.maker->takers) kept.maker->takers = kept.taken;
    if (codes && kept.taken < kept.maker->takers)
        Py_INCREF(codes);
    else
        kept.codes = NULL; /* to the last one they are given */
    return codes;
}

static PyObject *runner_call(PyObject *self, PyObject *const *arguments, size_t count, PyObject *names) {
    Runner *runner = (Runner *)self;
    const Family *family = runner->family;
    if (PyVectorcall_NARGS(count) != 1 || names) {
        PyErr_SetString(PyExc_TypeError, "a runner takes one tensor");
        return NULL;
    }
    PyObject *x = arguments[0];
    DLTensor in, own;
    struct key key;
    uint64_t slots[TENSORS + MOST_TENSORS];
    CUdevice device;
    void *stream;
    if ((PyObject *)Py_TYPE(x) != tensor_type || !described(x, &in) || !keyed(family, &in, &key)) Py_RETURN_NONE;
    Plan *plan = find(family, &key);
    if (!plan || plan->refused || current_device(&device) != CUDA_SUCCESS || device != family->device) Py_RETURN_NONE;
    for (int i = 0; i < family->tensors; i++) {
        if (!described(PyTuple_GET_ITEM(runner->tensors, i), &own)) Py_RETURN_NONE;
        const uint64_t address = address_of(&own);
        if (!address || (address % 16 == 0) != (family->aligned >> i & 1)) Py_RETURN_NONE;
        slots[TENSORS + i] = address;
    }
    if (api->current_work_stream(in.device.device_type, in.device.device_id, &stream)) return NULL;
    slots[INPUT] = address_of(&in);

    PyObject *sizes = plan->sizes, *strides = plan->strides, *scratch = NULL, *codes = NULL, *result = NULL;
    long long version = -1;
    bool made = true; /* here, and not by a layer before */
    Py_INCREF(plan); /* another thread may put a plan in its place */
    if (in.ndim == 2) {
        Py_INCREF(sizes);
        Py_INCREF(strides);
    } else if (!shaped(&in, family->out_features, &sizes, &strides))
        goto end;
    result = allocated(sizes, strides, plan->dtype, &slots[RESULT]);
    if (!result) goto end;
    const bool shares = plan->share && lasting(x, stream, &version);
    if (shares && kept.maker != runner && is_kept(plan, x, slots[INPUT], stream, version)) {
        codes = take_codes(&slots[CODES]);
        made = !codes;
        version = -1; /* the first one's are to stay */
    }
    const bool apart = !made || (version >= 0 && runner->takers);
    if (made && apart) codes = allocated(plan->codes_room, plan->room_strides, byte_type, &slots[CODES]);
    PyObject *room = apart ? plan->own_room : plan->room;
    if ((!apart || codes) && room != Py_None) scratch = allocated(room, plan->room_strides, byte_type, &slots[SCRATCH]);
    if ((apart && !codes) || (room != Py_None && !scratch)) {
        Py_CLEAR(result);
        goto end;
    }
    if (!apart) slots[CODES] = slots[SCRATCH], slots[SCRATCH] += plan->codes;
    CUresult said;
    Py_BEGIN_ALLOW_THREADS;
    said = played(plan, made ? 0 : plan->apart, slots, (CUstream)stream);
    Py_END_ALLOW_THREADS;
    if (said != CUDA_SUCCESS) {
        Py_CLEAR(result);
        failed(said);
    } else if (version >= 0) {
        PyObject *of = PyWeakref_NewRef(x, NULL);
        if (of) {
            if (kept.codes) kept.maker->takers = kept.taken; /* fewer than before */
            keep(of, apart ? Py_NewRef(codes) : NULL, runner, plan, slots, stream, version);
        } else
            PyErr_Clear();
    }
end:
    Py_XDECREF(codes); /* memory that is taken again only by what comes later on this stream */
    Py_XDECREF(scratch);
    Py_XDECREF(sizes);
    Py_XDECREF(strides);
    Py_DECREF(plan);
    return result;
}

/* ---- families */

static PyObject *family_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    static char *known[] = {"in_features", "out_features", "device_type", "device", "tensors", "aligned", NULL};
    long long k, n;
    int device_type, device, tensors;
    unsigned int aligned;
    if (!PyArg_ParseTupleAndKeywords(arguments, names, "LLiiiI", known, &k, &n, &device_type, &device, &tensors, &aligned))
        return NULL;
    if (tensors > MOST_TENSORS) return PyErr_Format(PyExc_ValueError, "%d tensors are more than %d", tensors, MOST_TENSORS);
    Family *family = (Family *)type->tp_alloc(type, 0);
    if (!family) return NULL;
    family->in_features = k, family->out_features = n, family->device_type = device_type, family->device = device;
    family->tensors = tensors, family->aligned = aligned;
    return (PyObject *)family;
}

static PyObject *family_clear(Family *family, PyObject *nothing) {
    const int count = family->count;
    family->count = family->oldest = 0;
    for (int i = 0; i < count; i++) Py_CLEAR(family->plans[i]);
    Py_RETURN_NONE;
}

static void family_free(Family *family) {
    Py_XDECREF(family_clear(family, NULL));
    Py_TYPE(family)->tp_free((PyObject *)family);
}

/* Keeps a plan, in place of one with the same key, or of the oldest. */
static void add_plan(Family *family, Plan *plan) {
    Plan *before = NULL;
    int at = 0;
    while (at < family->count && !same(&family->plans[at]->key, &plan->key)) at++;
    if (at < family->count || family->count == MOST_PLANS) {
        if (at == family->count) at = family->oldest, family->oldest = (at + 1) % MOST_PLANS;
        before = family->plans[at];
    } else
        family->count++;
    family->plans[at] = (Plan *)Py_NewRef((PyObject *)plan);
    Py_XDECREF(before);
}

static bool keyed_or_error(Family *family, PyObject *x, struct key *key) {
    DLTensor t;
    if (described(x, &t) && keyed(family, &t, key)) return true;
    PyErr_SetString(PyExc_ValueError, "no plan can be found again for a tensor of this kind");
    return false;
}

static PyObject *family_refuse(Family *family, PyObject *x) {
    struct key key;
    if (!keyed_or_error(family, x, &key)) return NULL;
    Plan *plan = (Plan *)PlanType.tp_alloc(&PlanType, 0);
    if (!plan) return NULL;
    plan->key = key, plan->refused = true;
    add_plan(family, plan);
    Py_DECREF(plan);
    Py_RETURN_NONE;
}

/* A tuple of the only size of so many bytes, or None for no bytes. */
static PyObject *size_of(Py_ssize_t bytes) { return bytes ? Py_BuildValue("(n)", bytes) : Py_NewRef(Py_None); }

/* add(x, dtype, codes, scratch, steps, parameters, apart, share): what was recorded for x, in bytes. */
static PyObject *family_add(Family *family, PyObject *arguments) {
    PyObject *x, *dtype;
    Py_ssize_t codes, scratch, apart;
    unsigned long long share;
    Py_buffer steps, parameters;
    if (!PyArg_ParseTuple(arguments, "OOnny*y*nK", &x, &dtype, &codes, &scratch, &steps, &parameters, &apart, &share)) return NULL;
    Plan *plan = NULL;
    struct key key;
    if (!keyed_or_error(family, x, &key)) goto end;
    const Py_ssize_t many = steps.len / (Py_ssize_t)sizeof(struct step);
    const Py_ssize_t all = parameters.len / (Py_ssize_t)sizeof(struct parameter);
    const struct step *step = steps.buf;
    const struct parameter *parameter = parameters.buf;
    for (Py_ssize_t i = 0; i < many; i++) {
        int maps = 0;
        bool fits = step[i].count <= MOST_PARAMETERS && (Py_ssize_t)step[i].first + step[i].count <= all;
        fits = fits && (step[i].function || (step[i].count == 1 && parameter[step[i].first].kind == ADDRESS));
        for (uint32_t j = 0; fits && j < step[i].count; j++) {
            const struct parameter *p = parameter + step[i].first + j;
            maps += p->kind == MAP;
            fits = p->kind <= MAP && p->slot < (uint32_t)(TENSORS + family->tensors) && maps <= MOST_MAPS;
        }
        if (!fits) {
            PyErr_SetString(PyExc_ValueError, "a kernel has more parameters than a plan holds");
            goto end;
        }
    }
    if (apart < 0 || apart > many || codes < 0 || scratch < 0 || (share && !codes)) {
        PyErr_SetString(PyExc_ValueError, "codes are made by some of the steps, and take memory");
        goto end;
    }
    plan = (Plan *)PlanType.tp_alloc(&PlanType, 0);
    if (!plan) goto end;
    plan->key = key, plan->codes = codes, plan->scratch = scratch, plan->steps = many, plan->apart = apart, plan->share = share;
    plan->step = PyMem_Malloc(steps.len + 1);
    plan->parameter = PyMem_Malloc(parameters.len + 1);
    plan->dtype = Py_NewRef(dtype);
    plan->sizes = Py_BuildValue("(LL)", (long long)key.tokens, (long long)family->out_features);
    plan->strides = Py_BuildValue("(Li)", (long long)family->out_features, 1);
    plan->room = size_of(codes + scratch);
    plan->codes_room = size_of(codes);
    plan->own_room = size_of(scratch);
    plan->room_strides = Py_BuildValue("(i)", 1);
    if (!plan->step || !plan->parameter || !plan->sizes || !plan->strides || !plan->room || !plan->codes_room ||
        !plan->own_room || !plan->room_strides) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        goto end;
    }
    memcpy(plan->step, steps.buf, steps.len);
    memcpy(plan->parameter, parameters.buf, parameters.len);
    add_plan(family, plan);
end:
    Py_XDECREF(plan);
    PyBuffer_Release(&steps);
    PyBuffer_Release(&parameters);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static Py_ssize_t family_length(PyObject *self) { return ((Family *)self)->count; }

static int family_contains(PyObject *self, PyObject *x) {
    DLTensor t;
    struct key key;
    return described(x, &t) && keyed((Family *)self, &t, &key) && find((Family *)self, &key) != NULL;
}

static PySequenceMethods family_sequence = {.sq_length = family_length, .sq_contains = family_contains};

static PyMethodDef family_methods[] = {
    {"add", (PyCFunction)family_add, METH_VARARGS,
     "add(x, dtype, codes, scratch, steps, parameters, apart, share): a plan for tensors like x."},
    {"refuse", (PyCFunction)family_refuse, METH_O, "refuse(x): there can be no plan for tensors like x, which counts as one."},
    {"clear", (PyCFunction)family_clear, METH_NOARGS, "Forget all plans."},
    {NULL},
};

static PyTypeObject FamilyType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "quantkit.Family",
    .tp_basicsize = sizeof(Family),
    .tp_new = family_new,
    .tp_dealloc = (destructor)family_free,
    .tp_methods = family_methods,
    .tp_as_sequence = &family_sequence,
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

/* ---- runners */

static PyObject *runner_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    PyObject *family, *tensors;
    if (!PyArg_ParseTuple(arguments, "O!O!", &FamilyType, &family, &PyTuple_Type, &tensors)) return NULL;
    if (PyTuple_GET_SIZE(tensors) != ((Family *)family)->tensors)
        return PyErr_Format(PyExc_ValueError, "a layer of this family has %d tensors", ((Family *)family)->tensors);
    Runner *runner = (Runner *)type->tp_alloc(type, 0);
    if (!runner) return NULL;
    runner->call = runner_call, runner->family = (Family *)Py_NewRef(family), runner->tensors = Py_NewRef(tensors);
    return (PyObject *)runner;
}

static void runner_free(Runner *runner) {
    if (kept.maker == runner) keep(NULL, NULL, NULL, NULL, NULL, NULL, 0);
    Py_XDECREF(runner->family);
    Py_XDECREF(runner->tensors);
    Py_TYPE(runner)->tp_free((PyObject *)runner);
}

static PyTypeObject RunnerType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "quantkit.Runner",
    .tp_basicsize = sizeof(Runner),
    .tp_new = runner_new,
    .tp_dealloc = (destructor)runner_free,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Runner, call),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
};

/* ---- the module */

/* load(path, Tensor, empty_strided, byte_type): binds the driver, and what tensors are made with. */
static PyObject *load(PyObject *module, PyObject *arguments) {
    const char *path;
    PyObject *type, *make, *byte;
    if (!PyArg_ParseTuple(arguments, "sOOO", &path, &type, &make, &byte)) return NULL;
    void *driver = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!driver) return PyErr_Format(PyExc_OSError, "%s", dlerror());
    const struct {
        const char *name;
        void **where;
    } wanted[] = {
        {"cuLaunchKernelEx", (void **)&launch_kernel}, {"cuTensorMapReplaceAddress", (void **)&replace_address},
        {"cuTensorMapEncodeTiled", (void **)&encode_map}, {"cuMemsetD8Async", (void **)&write_zeros},
        {"cuCtxGetDevice", (void **)&current_device}, {"cuGetErrorString", (void **)&error_string},
        {"cuStreamIsCapturing", (void **)&is_capturing},
    };
    for (size_t i = 0; i < sizeof(wanted) / sizeof(*wanted); i++)
        if (!(*wanted[i].where = dlsym(driver, wanted[i].name)))
            return PyErr_Format(PyExc_OSError, "the driver has no %s", wanted[i].name);
    PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    if (!capsule) return NULL;
    api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule);
    if (!api) return NULL;
    if (api->header.version.major != 1 || !api->dltensor_from_py_object_no_sync)
        return PyErr_Format(PyExc_OSError, "torch speaks another DLPack than version 1");
    Py_XSETREF(tensor_type, Py_NewRef(type));
    Py_XSETREF(empty_strided, Py_NewRef(make));
    Py_XSETREF(byte_type, Py_NewRef(byte));
    Py_XSETREF(version_name, PyUnicode_InternFromString("_version"));
    Py_XSETREF(inference_name, PyUnicode_InternFromString("is_inference"));
    Py_RETURN_NONE;
}

/* tensor_map(type, size, swizzle, rows, columns, box_rows, box_columns) -> bytes: of a contiguous matrix at any address. */
static PyObject *tensor_map(PyObject *module, PyObject *arguments) {
    int type, swizzle, box_rows, box_columns;
    long long size, rows, columns;
    if (!PyArg_ParseTuple(arguments, "iLiLLii", &type, &size, &swizzle, &rows, &columns, &box_rows, &box_columns)) return NULL;
    CUtensorMap map;
    const cuuint64_t sizes[] = {columns, rows}, strides[] = {columns * size, rows * columns * size};
    const cuuint32_t box[] = {box_columns, box_rows}, steps[] = {1, 1};
    const CUresult result = encode_map(&map, (CUtensorMapDataType)type, 2, (void *)4096, sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, (CUtensorMapSwizzle)swizzle,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return failed(result);
    return PyBytes_FromStringAndSize((const char *)&map, sizeof(map));
}

static PyMethodDef functions[] = {
    {"load", load, METH_VARARGS, "load(path of the driver, Tensor, empty_strided, uint8)"},
    {"tensor_map", tensor_map, METH_VARARGS, "tensor_map(type, size, swizzle, rows, columns, box_rows, box_columns)"},
    {NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "quantkit_launch", NULL, -1, functions};

PyMODINIT_FUNC PyInit_quantkit_launch(void) {
    if (PyType_Ready(&PlanType) || PyType_Ready(&FamilyType) || PyType_Ready(&RunnerType)) return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (!module) return NULL;
    if (PyModule_AddObjectRef(module, "Family", (PyObject *)&FamilyType) ||
        PyModule_AddObjectRef(module, "Runner", (PyObject *)&RunnerType)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
