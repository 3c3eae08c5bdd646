/* A native Linux process that runs the code of a PE image: what the Linux
   backend patches in tests. Needs gcc and libc only.

     host --dll=FILE --call=NAME [--arg=N] [--allow=A,B] [--map=file|anon] [--base=HEX]
          [--spin=N] [--fp=N] [--sleep=N] [--block=N] [--churn=N] [--altstack=N] [--wait=N] [--shared=FILE]
     host --trace=PID      another tracer: seizes every thread of PID until its stdin ends

   The image is mapped at a random base, relocated (DIR64), bound to the stubs
   below and protected section by section. Exports are int f(int), Microsoft x64
   convention. The worker threads call one and count every value that is not
   allowed; those that sleep or block check their own system calls, because a
   call restarted wrongly shows there and nowhere else.

   It prints "ready PID BASE" and answers one line for each line read: "ok ...",
   or "error ...". Commands: see the table `commands`. It ends when its input does. */
#define _GNU_SOURCE
#include "host.h"

struct block *shared; /* of this process */
struct options opt = {.map = "file", .allow = {0}};
static int blocks_fd = -1;
static struct block *blocks;

void die(const char *what, const char *name)
{
	fprintf(stderr, "host: %s: %s\n", what, name ? name : strerror(errno));
	exit(3);
}

void note_fault(int kind, const char *what, long got, long want)
{
	struct block *s = shared;
	if (__atomic_fetch_add(kind == WRONG ? &s->wrong : &s->faults, 1, __ATOMIC_RELAXED) == 0)
		snprintf((char *)s->example, sizeof s->example, "%s: got %ld, want %ld", what, got, want);
}

/* Every thread has a thread environment block, as far as code reads one: gs:[0x30] is its own address. */
void make_teb(void)
{
	uint64_t *teb = calloc(1, 8192);
	if (!teb)
		die("no memory", "teb");
	teb[0x30 / 8] = (uint64_t)teb;
	teb[0x48 / 8] = (uint64_t)syscall(SYS_gettid); /* ClientId.UniqueThread */
	if (syscall(SYS_arch_prctl, ARCH_SET_GS, teb))
		die("arch_prctl", NULL);
}

void new_thread(void *(*f)(void *), void *arg)
{
	pthread_t t;
	pthread_attr_t a;
	pthread_attr_init(&a);
	pthread_attr_setdetachstate(&a, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&a, 256 << 10);
	if (pthread_create(&t, &a, f, arg))
		die("pthread_create", NULL);
	pthread_attr_destroy(&a);
}

static void share(const char *file)
{
	blocks_fd = file ? open(file, O_RDWR | O_CREAT, 0600) : memfd_create("host", 0);
	if (blocks_fd < 0 || ftruncate(blocks_fd, BLOCKS * sizeof(struct block)))
		die("cannot share", file);
	blocks = mmap(NULL, BLOCKS * sizeof(struct block), PROT_READ | PROT_WRITE, MAP_SHARED, blocks_fd, 0);
	close(blocks_fd);
	if (blocks == MAP_FAILED)
		die("cannot share", file);
}

/* A block for this process: one of each fork, and of each exec, so that a reader can tell them apart. */
void take_block(void)
{
	uint64_t n = __atomic_fetch_add(&blocks[0].next, 1, __ATOMIC_SEQ_CST) + 1;
	if (n >= BLOCKS)
		die("too many lives", "block");
	shared = &blocks[n];
	shared->index = n;
	shared->pid = getpid();
	shared->scratch = (uint64_t)scratch;
}

static const char *value_of(const char *arg, const char *name)
{
	size_t n = strlen(name);
	return strncmp(arg, name, n) == 0 && arg[n] == '=' ? arg + n + 1 : NULL;
}

static void parse(int c, char **v)
{
	for (int i = 1; i < c; i++) {
		const char *x;
		if ((x = value_of(v[i], "--dll"))) opt.dll = x;
		else if ((x = value_of(v[i], "--call"))) opt.call = x;
		else if ((x = value_of(v[i], "--arg"))) opt.arg = atoi(x);
		else if ((x = value_of(v[i], "--map"))) opt.map = x;
		else if ((x = value_of(v[i], "--base"))) opt.base = strtoull(x, NULL, 16);
		else if ((x = value_of(v[i], "--spin"))) opt.spin = atoi(x);
		else if ((x = value_of(v[i], "--fp"))) opt.fp = atoi(x);
		else if ((x = value_of(v[i], "--sleep"))) opt.sleep = atoi(x);
		else if ((x = value_of(v[i], "--block"))) opt.block = atoi(x);
		else if ((x = value_of(v[i], "--churn"))) opt.churn = atoi(x);
		else if ((x = value_of(v[i], "--altstack"))) opt.altstack = atoi(x);
		else if ((x = value_of(v[i], "--wait"))) opt.wait = atoi(x);
		else if ((x = value_of(v[i], "--shared"))) opt.shared = x;
		else if ((x = value_of(v[i], "--trace"))) trace(atoi(x));
		else if ((x = value_of(v[i], "--allow")))
			for (; *x && opt.allowed < MAX_ALLOW; x += *x == ',')
				opt.allow[opt.allowed++] = (int)strtol(x, (char **)&x, 0);
		else die("unknown option", v[i]);
	}
	if (!opt.dll || !opt.call)
		die("needed", "--dll=FILE and --call=NAME");
}

/* Memory at the same place in every life, for tests of exec: a writer that
   missed the exec would change the new program. */
static void map_probe(void)
{
	void *p = mmap((void *)PROBE, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (p != (void *)PROBE)
		die("cannot map", "probe");
	memset(p, 0x5a, 4096);
}

int main(int c, char **v)
{
	parse(c, v);
	arguments = v;
	signal(SIGPIPE, SIG_IGN); /* a child may end before its command reaches it */
	share(opt.shared);
	take_block();
	map_probe();
	make_teb();
	main_module = load_module(opt.dll, opt.base);
	called = find_export(main_module, opt.call);
	if (!called)
		die("no such export", opt.call);
	shared->base = (uint64_t)main_module->base;
	shared->entry = (uint64_t)called;
	shared->threads = 2; /* this one and the one that answers */
	start_workers();
	new_thread(control, NULL);
	wait_as_leader();
	return 0;
}
