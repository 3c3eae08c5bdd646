# A function in three parts: the second record is chained to the first.
	.text
	.globl parted
	.def parted; .scl 2; .type 32; .endef
	.seh_proc parted
parted:
	pushq %rbx
	.seh_pushreg %rbx
	subq $32, %rsp
	.seh_stackalloc 32
	.seh_endprologue
	nop
	.seh_startchained
	movq %rdi, 16(%rsp)
	.seh_savereg %rdi, 16
	.seh_endprologue
	nop
	.seh_endchained
	addq $32, %rsp
	popq %rbx
	ret
	.seh_endproc
