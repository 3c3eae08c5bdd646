/* A load configuration with CFG and EH continuation tables.
   Layout: IMAGE_LOAD_CONFIG_DIRECTORY64 of winnt.h. */
typedef unsigned int u32;
typedef unsigned long long u64;

extern char __guard_fids_table[], __guard_fids_count[], __guard_eh_cont_table[], __guard_eh_cont_count[];

__attribute__((naked)) void cf_check(void) { __asm__("ret"); }
#if defined(__x86_64__)
__attribute__((naked)) void cf_dispatch(void) { __asm__("jmp *%rax"); }
#else
__attribute__((naked)) void cf_dispatch(void) { __asm__("br x9"); }
#endif

__attribute__((section(".00cfg"), used)) void *const __guard_check_icall_fptr = (void *)cf_check;
__attribute__((section(".00cfg"), used)) void *const __guard_dispatch_icall_fptr = (void *)cf_dispatch;

__attribute__((used)) const struct {
	u32 size;
	char a[108];
	u64 check, dispatch, table, count;
	u32 flags;
	char b[116];
	u64 eh_table, eh_count;
	char c[40];
} _load_config_used = {
	sizeof _load_config_used,
	.check = (u64)&__guard_check_icall_fptr,
	.dispatch = (u64)&__guard_dispatch_icall_fptr,
	.table = (u64)__guard_fids_table,
	.count = (u64)__guard_fids_count,
	.flags = 0x410500,
	.eh_table = (u64)__guard_eh_cont_table,
	.eh_count = (u64)__guard_eh_cont_count,
};
