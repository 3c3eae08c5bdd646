/* A small PE loader: enough for DLLs of x64 code that import little. */
#define _GNU_SOURCE
#include "host.h"

#define MS __attribute__((ms_abi))

static uint64_t MS stub_GetTickCount64(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void MS stub_Sleep(uint32_t ms)
{
	uint64_t from = stub_GetTickCount64();
	struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
	if (nanosleep(&t, NULL))
		note_fault(FAULT, "Sleep: errno", errno, 0);
	else if (stub_GetTickCount64() + 1 < from + ms)
		note_fault(FAULT, "Sleep: milliseconds", (long)(stub_GetTickCount64() - from), (long)ms);
}

static uint32_t MS stub_GetCurrentThreadId(void) { return (uint32_t)syscall(SYS_gettid); }
static void *MS stub_GetProcessHeap(void) { return (void *)0x10000; }
static void *MS stub_HeapAlloc(void *heap, uint32_t flags, uint64_t n) { return flags & 8 ? calloc(1, n) : malloc(n); }
static int MS stub_HeapFree(void *heap, uint32_t flags, void *p) { free(p); return 1; }

static const struct { const char *name; void *f; } kernel32[] = {
	{"GetTickCount64", stub_GetTickCount64}, {"Sleep", stub_Sleep},
	{"GetCurrentThreadId", stub_GetCurrentThreadId}, {"GetProcessHeap", stub_GetProcessHeap},
	{"HeapAlloc", stub_HeapAlloc}, {"HeapFree", stub_HeapFree},
};

static uint16_t u16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static uint32_t u32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static uint64_t u64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }

static const uint8_t *headers(const uint8_t *image)
{
	return image + u32(image + 0x3c);
}

/* Data directory i of a mapped image: its address and size, NULL if there is none. */
static uint8_t *directory(struct module *m, int i, uint32_t *size)
{
	const uint8_t *optional = headers(m->base) + 24;
	if (u32(optional + 108) <= (uint32_t)i)
		return NULL;
	uint32_t rva = u32(optional + 112 + 8 * i);
	*size = u32(optional + 116 + 8 * i);
	if (!rva || !*size || rva >= m->size || *size > m->size - rva)
		return NULL;
	return m->base + rva;
}

/* Somewhere far from the host's own libraries and from 4 GiB, 64 KiB aligned. */
static uint8_t *reserve(uint32_t size, uint64_t base)
{
	for (int i = 0; i < 100; i++) {
		uint64_t at = base, r;
		if (!at) {
			if (getrandom(&r, sizeof r, 0) != sizeof r)
				die("getrandom", NULL);
			at = 0x100000000000ull + r % 0x6d0000000000ull;
			at &= ~0xffffull;
		}
		void *p = mmap((void *)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		if (p == (void *)at)
			return p;
		if (p != MAP_FAILED)
			munmap(p, size);
		if (base)
			die("that base is taken", NULL);
	}
	die("no room", "image");
}

static void relocate(struct module *m, uint64_t delta)
{
	uint32_t size;
	uint8_t *p = directory(m, 5, &size);
	if (!p || !delta)
		return;
	for (uint8_t *end = p + size; p + 8 <= end;) {
		uint32_t page = u32(p), n = u32(p + 4);
		if (n < 8 || n > (uint32_t)(end - p))
			die("bad relocation block", m->path);
		for (uint32_t o = 8; o + 2 <= n; o += 2) {
			uint16_t e = u16(p + o);
			uint32_t rva = page + (e & 0xfff);
			if (e >> 12 == 0)
				continue;
			if (e >> 12 != 10 || rva > m->size - 8)
				die("unknown relocation", m->path);
			uint64_t v = u64(m->base + rva) + delta;
			memcpy(m->base + rva, &v, 8);
		}
		p += n;
	}
}

static void *stub(const char *dll, const char *name)
{
	if (!strcasecmp(dll, "kernel32.dll"))
		for (size_t i = 0; i < sizeof kernel32 / sizeof *kernel32; i++)
			if (!strcmp(kernel32[i].name, name))
				return kernel32[i].f;
	fprintf(stderr, "host: unknown import %s from %s\n", name, dll);
	exit(3);
}

static void bind_imports(struct module *m)
{
	uint32_t size;
	uint8_t *d = directory(m, 1, &size);
	for (; d && u32(d + 12); d += 20) {
		const char *dll = (char *)m->base + u32(d + 12);
		uint8_t *names = m->base + (u32(d) ? u32(d) : u32(d + 16)), *slots = m->base + u32(d + 16);
		for (; u64(names); names += 8, slots += 8) {
			if (u64(names) >> 63) {
				char ordinal[32];
				snprintf(ordinal, sizeof ordinal, "#%u", (unsigned)u16(names));
				stub(dll, ordinal);
			}
			void *f = stub(dll, (char *)m->base + u32(names) + 2);
			memcpy(slots, &f, 8);
		}
	}
}

static void protect(struct module *m)
{
	const uint8_t *h = headers(m->base), *s = h + 24 + u16(h + 20);
	for (int n = u16(h + 6); n > 0; n--, s += 40) {
		uint32_t flags = u32(s + 36), size = u32(s + 8);
		int prot = (flags & 0x40000000 ? PROT_READ : 0) | (flags & 0x80000000 ? PROT_WRITE : 0) | (flags & 0x20000000 ? PROT_EXEC : 0);
		if (mprotect(m->base + u32(s + 12), (size + 4095) & ~4095u, prot))
			die("mprotect", NULL);
	}
}

struct module *load_module(const char *path, uint64_t base)
{
	struct module *m = calloc(1, sizeof *m);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	if (!m || fd < 0 || fstat(fd, &st))
		die("cannot open", path);
	snprintf(m->path, sizeof m->path, "%s", path);
	uint8_t *file = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (file == MAP_FAILED || st.st_size < 1024 || u16(file) != 0x5a4d || u32(file + 0x3c) > st.st_size - 512)
		die("no PE image", path);
	const uint8_t *h = headers(file), *optional = h + 24;
	if (u32(h) != 0x4550 || u16(h + 4) != 0x8664 || u16(optional) != 0x20b)
		die("no PE image for x64", path);
	m->size = (u32(optional + 56) + 4095) & ~4095u;
	uint32_t header_size = u32(optional + 60);
	m->base = reserve(m->size, base);
	if (mprotect(m->base, m->size, PROT_READ | PROT_WRITE) || header_size > m->size || header_size > st.st_size)
		die("bad headers", path);
	memcpy(m->base, file, header_size);
	const uint8_t *s = h + 24 + u16(h + 20);
	for (int n = u16(h + 6); n > 0; n--, s += 40) {
		uint32_t size = u32(s + 8) < u32(s + 16) ? u32(s + 8) : u32(s + 16);
		if (u32(s + 12) > m->size || size > m->size - u32(s + 12) || u32(s + 20) > st.st_size || size > st.st_size - u32(s + 20))
			die("section out of bounds", path);
		memcpy(m->base + u32(s + 12), file + u32(s + 20), size);
	}
	relocate(m, (uint64_t)m->base - u64(optional + 24));
	bind_imports(m);
	/* Both ways occur: Wine maps the headers from the file, so that the path shows, and leaves the rest anonymous. */
	if (!strcmp(opt.map, "file")) {
		if (mmap(m->base, 4096, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0) == MAP_FAILED)
			die("mmap of the headers", NULL);
	} else if (mprotect(m->base, 4096, PROT_READ))
		die("mprotect", NULL);
	munmap(file, (size_t)st.st_size);
	close(fd);
	protect(m);
	return m;
}

void unload_module(struct module *m)
{
	munmap(m->base, m->size);
	free(m);
}

export_fn find_export(struct module *m, const char *name)
{
	uint32_t size;
	uint8_t *d = directory(m, 0, &size);
	if (!d)
		return NULL;
	for (uint32_t i = 0; i < u32(d + 24); i++) {
		const char *n = (char *)m->base + u32(m->base + u32(d + 32) + 4 * i);
		if (!strcmp(n, name))
			return (export_fn)(m->base + u32(m->base + u32(d + 28) + 4 * u16(m->base + u32(d + 36) + 2 * i)));
	}
	return NULL;
}
